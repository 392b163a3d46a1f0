#!/usr/bin/env bash
# The images' locks, docker/locks/FLAVOUR.txt, from the dependency list in pyproject.toml:
#
#   docker/lock.sh [FLAVOUR...]             make them (ampere, volta, cpu; all without an argument)
#   docker/lock.sh --upgrade [FLAVOUR...]   the same, and take the newest releases that fit
#   docker/lock.sh --check [FLAVOUR...]     resolve again; 1 if pins differ from the files
#
# A flavour's lock is the project, its extras `train` and FLAVOUR, and the group `build`, for
# Linux on x86-64. Pins that a file has are kept as long as they fit, so that a release that
# appeared meanwhile changes nothing. Needs python3 with venv, and a package index.
#
# cpu: the CPU build of torch is not on PyPI. uv takes it from PyTorch's own index, or, where that
# cannot be reached, from a folder that has the wheel as published: TORCH_CPU_WHEELS=FOLDER.
# Its pin then reads 2.13.0+cpu, with the checksum of that wheel.
set -euo pipefail
cd "$(dirname "$0")/.."

UV=0.13.9
UV_SHA256=d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19 # Linux on x86-64

usage() {
    sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p}' "$0"
}

die() {
    printf 'docker/lock.sh: %s\n' "$*" >&2
    exit 2
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Only a Python for the metadata of DeepSpeed's sdist; none is fetched for that.
export UV_PYTHON_DOWNLOADS=never

find_uv() {
    uv=$(command -v uv || true)
    if [ -n "$uv" ] && [[ "$("$uv" --version)" == "uv $UV"* ]]; then
        return
    fi
    python3 -m venv "$scratch/uv"
    printf 'uv==%s --hash=sha256:%s\n' "$UV" "$UV_SHA256" >"$scratch/uv.txt"
    "$scratch/uv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --only-binary :all: --require-hashes --requirement "$scratch/uv.txt"
    uv=$scratch/uv/bin/uv
}

# compile FLAVOUR FILE: resolve into FILE, keeping the pins that it has
compile() {
    local flavour=$1 file=$2 python=3.12 # Ubuntu 24.04's, in the GPU images
    local -a more=(--no-binary flash-attn)
    if [ "$flavour" = cpu ]; then
        python=3.11 # where the tests run
        if [ -n "${TORCH_CPU_WHEELS:-}" ]; then
            more=(--find-links "$TORCH_CPU_WHEELS")
        else
            more=(--torch-backend cpu)
        fi
    fi
    "$uv" pip compile pyproject.toml --quiet --extra train --extra "$flavour" --group build \
        --generate-hashes --python "$(command -v python3)" --python-version "$python" \
        --python-platform x86_64-manylinux_2_28 --only-binary :all: --no-binary deepspeed \
        "${more[@]}" "${upgrade[@]}" --custom-compile-command "docker/lock.sh $flavour" \
        --output-file "$file" ||
        die "$flavour does not resolve$([ "$flavour" != cpu ] ||
            echo "; without PyTorch's own index, give TORCH_CPU_WHEELS=FOLDER (see --help)")"
}

pins() {
    sed -nE 's/^([A-Za-z0-9][^ ]*==[^ ]+).*/\1/p' "$1"
}

check=0 upgrade=() flavours=()
for argument; do
    case $argument in
    --check) check=1 ;;
    --upgrade) upgrade=(--upgrade) ;;
    -h | --help) usage && exit ;;
    ampere | volta | cpu) flavours+=("$argument") ;;
    *) die "unknown argument $argument; the flavours are ampere, volta and cpu" ;;
    esac
done
[ ${#flavours[@]} -gt 0 ] || flavours=(ampere volta cpu)
if [ $check = 1 ] && [ ${#upgrade[@]} -gt 0 ]; then
    die "--check compares with the pins that are there, --upgrade moves them: give one of the two"
fi

find_uv
wrong=0
for flavour in "${flavours[@]}"; do
    lock=docker/locks/$flavour.txt
    fresh=$scratch/$flavour.txt
    if [ -e "$lock" ]; then
        cp "$lock" "$fresh"
    elif [ $check = 1 ]; then
        die "$lock is not there; make it with docker/lock.sh $flavour"
    fi
    compile "$flavour" "$fresh"
    if [ $check = 0 ]; then
        mkdir -p docker/locks
        cp "$fresh" "$lock"
        echo "$lock: $(pins "$lock" | wc -l) pins"
    elif diff -u --label "$lock" --label "resolved from pyproject.toml" \
        <(pins "$lock") <(pins "$fresh"); then
        echo "$lock: resolves to the same $(pins "$lock" | wc -l) pins"
    else
        wrong=1
        echo "$lock: pyproject.toml resolves to other pins; run docker/lock.sh $flavour" >&2
    fi
done
exit $wrong
