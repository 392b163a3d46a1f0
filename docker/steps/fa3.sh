#!/bin/sh
# fa3.sh SHA256: /out/ gets the flash-attn 3 wheel of docker/wheels that has this hash.
set -eu
mkdir -p /out
if [ -z "$1" ]; then
    echo "error: WITH_FA3=1 needs FA3_SHA256, the hash that the wheel must have" >&2
    echo "  -> take it from where the wheel comes from, or sha256sum a wheel that you trust" >&2
    exit 1
fi
for wheel in /wheels/flash_attn_3-*.whl; do
    if [ -f "$wheel" ] && echo "$1  $wheel" | sha256sum --check --status; then
        cp "$wheel" /out/
        exit 0
    fi
done
echo "error: no flash_attn_3-*.whl in docker/wheels has the SHA-256 $1" >&2
echo "  -> put it there; without WITH_FA3 an H100 runs flash-attn 2" >&2
exit 1
