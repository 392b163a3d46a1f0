#!/bin/bash
# wheel.sh: a wheel in /out, built from the source archive in /wheels against the torch of /opt/venv.
# The package reads what to build from the environment (see the Dockerfile).
set -euo pipefail
export PATH=/opt/venv/bin:$PATH # ninja, and the python that setup.py scripts call

if ! [ -s /wheels/lock.txt ]; then
    echo "error: the lock of this flavour has no such package" >&2
    echo "  -> --build-arg WITH_FLASH_ATTN=0, which docker/build.sh gives where it is needed" >&2
    exit 1
fi
# --no-cache-dir: pip's cache knows a wheel by its name, not by what it was built for.
/opt/pip/bin/pip --python /opt/venv/bin/python wheel --no-index --no-cache-dir --no-deps \
    --no-build-isolation --require-hashes --find-links /wheels --wheel-dir /out \
    --requirement /wheels/lock.txt
