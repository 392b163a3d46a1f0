#!/bin/bash
# The images: built, carried, converted. From anywhere in a checkout:
#
#   docker/build.sh image [OPTIONS] [-- BUILD OPTIONS]   build and tag
#       --flavor ampere|volta|cpu   A100, H100, B200 | V100, T4 | no GPU, to try          (ampere)
#       --tag NAME:TAG                                                  (sft_job:VERSION-FLAVOR)
#       --no-flash-attn             minutes instead of half an hour; torch's own kernel (ampere)
#       --fa3 WHEEL --fa3-sha256 HEX     add flash-attn 3 for H100 from docker/wheels         (ampere)
#       --offline                   packages from docker/wheels alone
#       --pip-conf FILE --ca FILE   a mirror, and its certificate (pip.conf: cert = /run/secrets/ca_cert)
#       --tool docker|buildah|podman                                      (the first that is there)
#       BUILD OPTIONS go to the tool as they are: --build-arg MAX_JOBS=8, --network host, ...
#   docker/build.sh wheelhouse [OPTIONS]       download what a build needs into docker/wheels
#   docker/build.sh save --tag NAME:TAG FILE.tar       for `docker load`, and for the next
#   docker/build.sh sif FILE.tar FILE.sif [--flavor volta] [-- --fakeroot ...]      for Apptainer
#
# A site without internet: build outside, and carry the result: save, or sif. To build inside, carry
# docker/wheels of `wheelhouse`, and the two bases with their system packages (docs/images.md).
# cpu needs a base with Python 3.11 and PyTorch's CPU wheel, from its own index (--pip-conf) or docker/wheels.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")

die() {
    printf 'error: %s\n  -> %s\n' "$1" "$2" >&2
    exit 2
}

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$root/docker/build.sh"; }

# The value of an option, or what is missing.
value() { [ $# -ge 2 ] || die "$1 needs a value" "docker/build.sh --help"; echo "$2"; }

choose_tool() {
    local candidate
    for candidate in ${tool:-docker buildah podman}; do
        command -v "$candidate" >/dev/null || continue
        # A client without its daemon cannot build.
        [ "$candidate" != docker ] || docker version >/dev/null 2>&1 || continue
        tool=$candidate
        return
    done
    die "${tool:-none of docker, buildah and podman} is not here, or its daemon does not answer" \
        "install one of them, start dockerd, or see --tool"
}

command=${1-}
[ $# -eq 0 ] || shift
base='' flavor=ampere tag='' tool='' fa3='' fa3_sha256='' pip_conf='' ca='' flash_attn=1 offline=0 operands=() extra=()
while [ $# -gt 0 ]; do
    case $1 in
    --flavor) flavor=$(value "$@"); shift ;;
    --tag) tag=$(value "$@"); shift ;;
    --tool) tool=$(value "$@"); shift ;;
    --fa3) fa3=$(value "$@"); fa3=$(realpath -m "$fa3"); shift ;;
    --fa3-sha256) fa3_sha256=$(value "$@"); shift ;;
    --pip-conf) pip_conf=$(value "$@"); pip_conf=$(realpath -m "$pip_conf"); shift ;;
    --ca) ca=$(value "$@"); ca=$(realpath -m "$ca"); shift ;;
    --no-flash-attn) flash_attn=0 ;;
    --offline) offline=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; extra=("$@"); break ;;
    -*) die "unknown option $1" "docker/build.sh --help" ;;
    *) operands+=("$(realpath -m "$1")") ;;
    esac
    shift
done
cd "$root"

case $tool in
'' | docker | buildah | podman) ;;
*) die "--tool $tool is not known" "docker, buildah or podman" ;;
esac
case $flavor in
ampere) file=Dockerfile definition=docker/sft_job.def ;;
volta) file=docker/Dockerfile.v100 definition=docker/sft_job.v100.def ;;
cpu) file=Dockerfile definition=docker/sft_job.def flash_attn=0 base=docker.io/library/debian:12 ;;
*) die "--flavor $flavor is not known" "ampere, volta or cpu" ;;
esac
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' sft_job/__init__.py)
: "${tag:=sft_job:$version-$flavor}"

build() { # build TARGET OPTION...: options of the build that this tool and these arguments make
    local target=$1 arguments with_fa3=0
    shift
    choose_tool
    [ -z "$fa3" ] || with_fa3=1
    arguments=(--file "$file" --target "$target" --build-arg "FLAVOR=$flavor" --build-arg "VERSION=$version")
    if [ -n "$base" ]; then # its lock is for Python 3.11, and nothing of it needs nvcc
        arguments+=(--build-arg "FINAL_BASE=$base" --build-arg "BUILD_BASE=$base" --build-arg PYTHON=3.11)
    fi
    if [ "$flavor" != volta ]; then
        # Both said: Buildah 1.28 leaves out stages that it would need defaults to find.
        arguments+=(--build-arg "WITH_FLASH_ATTN=$flash_attn" --build-arg "WITH_FA3=$with_fa3")
    elif [ "$flash_attn" = 0 ] || [ -n "$fa3" ]; then
        die "flash-attn has no kernels for V100 and T4" "leave --no-flash-attn and --fa3 out"
    fi
    if [ -n "$fa3" ]; then
        case $fa3 in "$root"/docker/wheels/flash_attn_3-*.whl) ;; *)
            die "--fa3 $fa3 is not docker/wheels/flash_attn_3-....whl" "the build sees no other folder"
            ;;
        esac
        [ -f "$fa3" ] || die "--fa3 $fa3 is not there" "put the wheel into docker/wheels"
        [ -n "$fa3_sha256" ] || die "--fa3 needs --fa3-sha256" "take it from where the wheel comes from"
        arguments+=(--build-arg "FA3_SHA256=$fa3_sha256")
    fi
    if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
        # The commit's time, not now: the same commit gives the same layers.
        local revision created
        revision=$(git rev-parse HEAD)
        created=$(TZ=UTC git log -1 --format=%cd --date=format-local:%Y-%m-%dT%H:%M:%SZ)
        git diff --quiet HEAD || revision+=-dirty
        arguments+=(--build-arg "REVISION=$revision" --build-arg "CREATED=$created")
    fi
    if [ "$offline" = 1 ]; then
        [ -z "$pip_conf$ca" ] || die "--offline asks no mirror" "leave --pip-conf and --ca out"
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
        pip_conf=$scratch/pip.conf
        printf '[global]\nno-index = true\n' >"$pip_conf"
    fi
    local secret
    for secret in "pip_conf=$pip_conf" "ca_cert=$ca"; do
        [ -n "${secret#*=}" ] || continue
        [ -r "${secret#*=}" ] || die "${secret#*=} cannot be read" "name a file that is there"
        arguments+=(--secret "id=${secret%%=*},src=${secret#*=}")
    done
    # The Docker format keeps what OCI's has no field for. Buildah's cache does not see that a stage which
    # a step mounts has changed, and 1.28 cannot mount one that comes from the cache. Without layers
    # Podman 4.3 would not know the image that it has built.
    [ "$tool" = docker ] || arguments+=(--format docker --no-cache)
    "$tool" build "${arguments[@]}" "$@" "${extra[@]}" .
}

case $command in
image)
    [ ${#operands[@]} -eq 0 ] || die "image takes no ${operands[0]}" "docker/build.sh --help"
    build final --tag "$tag"
    echo "built $tag"
    ;;
wheelhouse)
    # The image's own Python and pip fetch, so that what they need is what is fetched.
    build wheelhouse --output type=local,dest=docker/wheels
    echo "docker/wheels has $(find docker/wheels -name '*.whl' -o -name '*.tar.gz' | wc -l) packages for $flavor"
    ;;
save)
    [ ${#operands[@]} -eq 1 ] || die "save needs one file" "docker/build.sh save --tag $tag FILE.tar"
    choose_tool
    archive=${operands[0]}
    # Beside, then renamed: no half archive is taken for a whole one.
    case $tool in
    docker) docker save --output "$archive.part" "$tag" ;;
    podman) podman save --quiet --format docker-archive --output "$archive.part" "$tag" ;;
    buildah) buildah push --quiet "$tag" "docker-archive:$archive.part:$tag" ;;
    esac || die "$tag cannot be saved by $tool" "build it first, with the same --tag and --tool"
    mv "$archive.part" "$archive"
    echo "saved $archive; there: docker load --input $archive"
    ;;
sif)
    [ ${#operands[@]} -eq 2 ] || die "sif needs two files" "docker/build.sh sif FILE.tar FILE.sif"
    command -v apptainer >/dev/null || die "apptainer is not here" "install it, or convert where it is"
    archive=${operands[0]} image=${operands[1]}
    [ -r "$archive" ] || die "$archive is not there" "docker/build.sh save --tag $tag $archive"
    apptainer build "${extra[@]}" --build-arg "FROM=$archive" --build-arg "VERSION=$version" \
        --build-arg "FLAVOR=$flavor" "$image" "$definition"
    ;;
'' | -h | --help | help) usage ;;
*) die "unknown command $command" "docker/build.sh --help" ;;
esac
