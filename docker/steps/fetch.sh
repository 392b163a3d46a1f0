#!/bin/bash
# fetch.sh LOCK: /wheelhouse with every file of the lock that this Python needs, each checked by its hash.
set -euo pipefail
lock=$1
cd "$(dirname "$0")"
export PATH=/opt/venv/bin:$PATH
# pip asks a source archive for its name by running its setup.py; these need torch for that, and no CUDA.
export FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE DS_ACCELERATOR=cpu

download() {
    /opt/pip/bin/pip --python /opt/venv/bin/python download --no-deps --no-build-isolation \
        --require-hashes --find-links /wheels --dest /wheelhouse --requirement "$1"
}
./lock-part.sh only deepspeed flash-attn <"$lock" >sources.txt
download wheels.txt
download sources.txt
