#!/usr/bin/env bash
# What an image does on this machine's GPUs; nothing of it can be known without them.
#
#   docker/verify-gpu.sh [--tool docker|podman|apptainer] [--scratch FOLDER] [--dry-run] IMAGE [CHECK...]
#
# Runs in the image, read-only and as the user who calls, without a network but under Apptainer:
#   gpus            the GPUs, and that the image and its torch are for them and for the driver
#   image           what the build has checked, again
#   kernels         every attention and loss kernel against exact references, with gradients
#   ops             DeepSpeed's optimizers against torch's, on the GPU and on the host
#   fsdp, zero3, zero3-offload
#                   three steps from job file to exported model on all GPUs
#   speed           tokens/s/GPU and MFU under both engines (about ten minutes)
# and prints a table. Ends with 1 if one failed. All of them, or those that are named.
#
# IMAGE is a tag, or a .sif file for Apptainer. Without --tool: apptainer for a .sif, else docker
# or podman, whichever there is. --scratch (default: TMPDIR or /tmp) takes 20 GB for `speed`.
# --dry-run prints the command. WITH_FLASH_ATTN=0 and WITH_FA3=1 say that the image was built so.
set -euo pipefail

die() {
    printf 'docker/verify-gpu.sh: %s\n' "$*" >&2
    exit 2
}

usage() {
    sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p}' "$0"
}

tool='' image='' scratch=${TMPDIR:-/tmp} dry=0 checks=()
while [ $# -gt 0 ]; do
    case $1 in
    --tool | --scratch)
        [ $# -gt 1 ] || die "$1 needs a value"
        if [ "$1" = --tool ]; then tool=$2; else scratch=$2; fi
        shift
        ;;
    --dry-run) dry=1 ;;
    -h | --help) usage && exit ;;
    -*) die "unknown option $1; --help has them" ;;
    *) if [ -z "$image" ]; then image=$1; else checks+=("$1"); fi ;;
    esac
    shift
done
[ -n "$image" ] || die "which image? For example: docker/verify-gpu.sh sft_job:latest"

if [ -z "$tool" ]; then
    case $image in
    *.sif) tool=apptainer ;;
    *)
        tool=$(basename "$(command -v docker || command -v podman || true)")
        [ -n "$tool" ] || die "neither docker nor podman is here; for Apptainer, IMAGE is a .sif file"
        ;;
    esac
fi
[ -d "$scratch" ] || die "$scratch is no folder; give one with --scratch"
here=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(cd "$scratch" && pwd)

# Without sft_job itself: the image's own must be found.
parts=(docker tests benchmarks)
inside=(python /verify/docker/verify_gpu.py --scratch /scratch "${checks[@]}")
kept=(WITH_FLASH_ATTN WITH_FA3)
set_to=(TMPDIR=/scratch PYTHONDONTWRITEBYTECODE=1)
for name in "${kept[@]}"; do
    [ -z "${!name:-}" ] || set_to+=("$name=${!name}")
done

case $tool in
docker | podman)
    command=("$tool" run --rm --network none --read-only --tmpfs /tmp:exec --shm-size=16g
        --ulimit memlock=-1 --ulimit stack=67108864 --user "$(id -u):$(id -g)")
    if [ "$tool" = docker ]; then
        command+=(--gpus all)
    else
        command+=(--device nvidia.com/gpu=all --userns keep-id)
    fi
    for part in "${parts[@]}"; do command+=(--volume "$here/$part:/verify/$part:ro"); done
    command+=(--volume "$scratch:/scratch" --workdir /verify)
    for value in "${set_to[@]}"; do command+=(--env "$value"); done
    command+=("$image" "${inside[@]}")
    ;;
apptainer)
    command=(apptainer exec --nv)
    for part in "${parts[@]}"; do command+=(--bind "$here/$part:/verify/$part:ro"); done
    command+=(--bind "$scratch:/scratch" --pwd /verify)
    for value in "${set_to[@]}"; do command+=(--env "$value"); done
    command+=("$image" "${inside[@]}")
    ;;
*) die "unknown tool $tool; docker, podman and apptainer are known" ;;
esac

if [ $dry = 1 ]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    exit
fi
command -v "$tool" >/dev/null || die "$tool is not on PATH"
exec "${command[@]}"
