#!/bin/bash
# fetch.sh: /wheelhouse with every file of the lock that this Python needs, each checked by its hash.
# After locked.sh, which leaves wheels.txt, and sources.sh.
set -euo pipefail
cd "$(dirname "$0")"

/opt/pip/bin/pip --python /opt/venv/bin/python download --no-deps --only-binary :all: \
    --require-hashes --find-links /wheels --dest /wheelhouse --requirement wheels.txt
cp /sources/*/*.tar.gz /wheelhouse/
