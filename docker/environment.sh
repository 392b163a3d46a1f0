# shellcheck shell=dash
# What a run needs of its environment, beyond the image's ENV; read by the entry point, and by
# Apptainer before `run`, `exec` and `shell`. Here, and not in ENV, because Apptainer lets an image's
# ENV override what the user has set: everything here is a default for what is unset.

# While Apptainer reads this, what the user has set is put aside as lines of __exported_env__; it
# comes back afterwards, but only where this has set nothing.
for sft_job_name in TMPDIR USER SFT_JOB_KEEP_PYTHONPATH \
    TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR TORCHINDUCTOR_CACHE_DIR; do
    sft_job_value=$(printf '%s\n' "${__exported_env__-}" | sed -n "s/^$sft_job_name=//p")
    [ -z "$sft_job_value" ] || export "$sft_job_name=$sft_job_value"
done

# An environment module's Python packages would be taken before the image's.
if [ -z "${SFT_JOB_KEEP_PYTHONPATH-}" ]; then
    export PYTHONPATH='' PYTHONHOME='' # Apptainer puts back what is unset
fi

# Slurm's TMPDIR is often a folder of the node that nobody has bound.
if [ -n "${TMPDIR-}" ] && ! { [ -d "$TMPDIR" ] && [ -w "$TMPDIR" ]; }; then
    export TMPDIR=/tmp
fi

# Compiled code: on the node, not in a home that nodes with other CPUs share; and in a folder that
# is surely ours, since what lies in it is executed.
sft_job_uid=$(id -u)
sft_job_cache=${TMPDIR:-/tmp}/sft_job-$sft_job_uid
mkdir -m 700 "$sft_job_cache" 2>/dev/null || true
if ! [ -O "$sft_job_cache" ]; then
    sft_job_cache=$(mktemp -d 2>/dev/null) || sft_job_cache=
fi
if [ -n "$sft_job_cache" ]; then
    export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$sft_job_cache/triton}"
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$sft_job_cache/torch_extensions}"
    export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$sft_job_cache/torchinductor}"
    # With a home, the hub cache is where everyone looks for it.
    if ! [ -w "${HOME:-/nonexistent}" ]; then
        export HOME="$sft_job_cache/home"
        mkdir -p "$HOME"
    fi
fi
# Programs that ask for the user's name fail where /etc/passwd does not have it.
sft_job_value=$(id -un 2>/dev/null) || sft_job_value=uid$sft_job_uid
export USER="${USER:-$sft_job_value}"
unset sft_job_name sft_job_value sft_job_uid sft_job_cache
