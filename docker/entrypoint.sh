#!/bin/sh
# The image's entry point.
#   IMAGE                         help
#   IMAGE train job.yaml ...      sft-job train job.yaml ...; so with each of its commands
#   IMAGE PROGRAM ...             any other program
set -eu
share=/opt/sft_job

refuse() {
    printf 'error: %s\n  -> %s\n' "$1" "$2" >&2
    exit 2
}

[ -z "${PYTHONPATH-}" ] || [ -n "${SFT_JOB_KEEP_PYTHONPATH-}" ] ||
    echo "note: PYTHONPATH=$PYTHONPATH is not used inside the image; SFT_JOB_KEEP_PYTHONPATH=1 keeps it" >&2
# shellcheck source=docker/environment.sh
. "$share/environment.sh"

case ${1-} in
"" | -h | --help)
    sft-job --help
    cat "$share/help.txt"
    exit 0
    ;;
-V | --version)
    cat "$share/BUILD_INFO.json"
    exec sft-job --version
    ;;
esac
# exec everywhere: signals must reach what runs, and its exit code be the container's.
if ! grep --quiet --line-regexp --fixed-strings --regexp="$1" "$share/commands"; then
    command -v "$1" >/dev/null ||
        refuse "$1 is neither a command of sft-job nor a program in this image" "without arguments the image prints its help"
    exec "$@"
fi

if [ -z "${TRITON_CACHE_DIR-}" ]; then
    refuse "no folder can be written to for temporary files: ${TMPDIR:-/tmp}" \
        "docker run --read-only needs --tmpfs /tmp; or mount a folder and name it with --env TMPDIR=FOLDER"
fi
if [ "$1" = train ]; then
    # NCCL passes gradients between the GPUs of a machine through /dev/shm, and dies in the middle
    # of the start when it is full.
    gpus=$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' | wc -l)
    shm=$(df --output=size --block-size=1M /dev/shm | tail -n 1 | tr -d " ")
    if [ "$gpus" -gt 1 ] && [ "$shm" -lt 512 ]; then
        refuse "/dev/shm has $shm MiB, too few for NCCL between $gpus GPUs" \
            "docker run --shm-size=16g (or --ipc=host); apptainer: without --containall"
    fi
fi
exec sft-job "$@"
