#!/bin/bash
# sources.sh LOCK: /sources/NAME for each source archive of the lock, and /sources/torch for what they are
# built with: the files, each checked by its hash, and lock.txt, the part of the lock that names them.
set -euo pipefail
lock=$1
cd "$(dirname "$0")"
export PATH=/opt/venv/bin:$PATH
# pip asks a source archive for its name by running its setup.py; these need torch for that, and no CUDA.
export FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE DS_ACCELERATOR=cpu

fetch() { # fetch FOLDER NAME...
    local folder=/sources/$1
    mkdir -p "$folder"
    ./lock-part.sh only "${@:2}" <"$lock" >"$folder/lock.txt"
    [ -s "$folder/lock.txt" ] || return 0
    /opt/pip/bin/pip --python /opt/venv/bin/python download --no-deps --no-build-isolation \
        --require-hashes --find-links /wheels --dest "$folder" --requirement "$folder/lock.txt"
}
fetch deepspeed deepspeed
fetch flash-attn flash-attn # V100 has none
# torch, and the dependency group `build` of pyproject.toml
names=$(python closure.py torch setuptools wheel ninja packaging psutil)
# shellcheck disable=SC2086 # a list
fetch torch $names
