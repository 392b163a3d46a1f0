#!/bin/bash
# locked.sh PYTHON LOCK: /opt/venv with every wheel of the lock, each checked by its hash.
# What the lock has as source only is left to wheel.sh.
set -euo pipefail
python=$1 lock=$2
cd "$(dirname "$0")"

"python$python" -m venv --without-pip /opt/venv
./lock-part.sh without deepspeed flash-attn <"$lock" >wheels.txt
/opt/pip/bin/pip --python /opt/venv/bin/python install --no-deps --require-hashes \
    --only-binary :all: --no-compile --find-links /wheels --requirement wheels.txt
# Once here instead of at every start. Some packages carry templates that are no Python: no failure.
/opt/venv/bin/python -m compileall -qq -j 0 /opt/venv/lib || true
