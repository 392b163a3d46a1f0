#!/bin/bash
# wheel.sh NAME LOCK: /out/NAME-....whl, built from the lock's source archive against the torch of
# /opt/venv. The package reads what to build from the environment (see the Dockerfile).
set -euo pipefail
name=$1 lock=$2
cd "$(dirname "$0")"
export PATH=/opt/venv/bin:$PATH # ninja, and the python that setup.py scripts call

mkdir -p /out
./lock-part.sh only "$name" <"$lock" >"$name.txt"
if ! [ -s "$name.txt" ]; then
    echo "error: $lock has no $name" >&2
    exit 1
fi
# --no-cache-dir: pip's cache knows a wheel by its name, not by what it was built for.
/opt/pip/bin/pip --python /opt/venv/bin/python wheel --no-cache-dir --no-deps --no-build-isolation \
    --require-hashes --find-links /wheels --wheel-dir /out --requirement "$name.txt"
