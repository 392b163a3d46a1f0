#!/bin/sh
# system.sh runtime|build PYTHON: Debian or Ubuntu packages of an image stage.
set -eu
stage=$1 python=$2
export DEBIAN_FRONTEND=noninteractive

# Triton compiles its launchers and DeepSpeed its CPU Adam at run time: a C++ compiler and Python's
# headers. The ib* and rdma packages are the user-space half of InfiniBand, which NCCL opens by name;
# the other half is the host's driver.
packages="python$python python$python-venv python$python-dev gcc g++ libc6-dev"
[ "$stage" = build ] ||
    packages="$packages tini ca-certificates libibverbs1 ibverbs-providers librdmacm1 libnuma1"

# A base that has them, made where there is internet, needs none.
# shellcheck disable=SC2086  # a list
if dpkg --status $packages >/dev/null 2>&1; then
    exit 0
fi
apt-get update -qq
# shellcheck disable=SC2086  # a list
if ! apt-get install -y -qq --no-install-recommends $packages; then
    echo "error: the base image's system has no python$python, or one of: $packages" >&2
    echo "  -> give --build-arg PYTHON the release that it has (Ubuntu 24.04: 3.12, Debian 12: 3.11)" >&2
    exit 1
fi
rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache
