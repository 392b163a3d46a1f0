# The image for A100, H100 and B200: flash-attn 2, bf16. V100 and T4: docker/Dockerfile.v100.
#
#   docker/build.sh image          or: docker build --tag sft_job .
#
# A full build takes 30 to 40 minutes on 16 cores with 110 GB of memory, nearly all of it in flash-attn
# (estimated from single files compiled for two of the three architectures; 7 to 8 CPU-hours, 5 to
# 6 GB for each of MAX_JOBS). --build-arg WITH_FLASH_ATTN=0 takes minutes instead: attention then runs on
# torch's own variable-length kernel, which is as exact and a little slower.
#
# The CUDA stages (wheel-flash-attn, the CUDA ops of wheel-deepspeed) have not been built to the end where
# this file is tested: there is no CUDA compiler and no registry there. Tested are all other stages, on
# a stand-in base with FLAVOR=cpu, and what these two read: tests/images, docs/images.md.
#
# Every package is installed by its hash (docker/locks, made by docker/lock.sh). Optional secrets:
#   --secret id=pip_conf,src=pip.conf   a mirror; with no-index, docker/wheels alone
#   --secret id=ca_cert,src=ca.pem      its certificate; pip.conf says cert = /run/secrets/ca_cert

# Tags, because no registry could be asked for their digests where this was written. Take them from
# `docker buildx imagetools inspect` and give them as --build-arg FINAL_DIGEST=@sha256:...
ARG BUILD_BASE=docker.io/nvidia/cuda:12.8.1-devel-ubuntu24.04
ARG BUILD_DIGEST=
# Without CUDA: torch brings its own. NVIDIA's bases also have a libcuda for data-centre GPUs (cuda-compat)
# that some container toolkits put before the driver's own, and GeForce cards fail with.
ARG FINAL_BASE=docker.io/library/ubuntu:24.04
ARG FINAL_DIGEST=
# The base's own Python: packages are locked for 3.12.
ARG PYTHON=3.12
# Its lock is docker/locks/FLAVOR.txt.
ARG FLAVOR=ampere
ARG WITH_FLASH_ATTN=1
ARG WITH_FA3=0


FROM ${FINAL_BASE}${FINAL_DIGEST} AS python-base
ARG PYTHON
COPY docker/steps/system.sh /build/
RUN /build/system.sh runtime "$PYTHON"


# pip for the build lives outside: the image has no installer that could change its environment.
FROM python-base AS installer
ARG PYTHON
RUN "python$PYTHON" -m venv /opt/pip


# Packages that need no compiler.
FROM installer AS environment
ARG PYTHON
ARG FLAVOR
COPY docker/steps/locked.sh docker/steps/lock-part.sh docker/locks/${FLAVOR}.txt /build/
RUN --mount=type=bind,source=docker/wheels,target=/wheels \
    --mount=type=cache,target=/pip-cache \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_cert \
    PIP_CACHE_DIR=/pip-cache /build/locked.sh "$PYTHON" "/build/$FLAVOR.txt"


# What is compiled, and the packages that it is compiled with, each in its own folder. These stages
# ask nothing else, so that half an hour's work is done again when a file of these changes, and not
# at any other change of the lock or of docker/wheels.
FROM environment AS sources
ARG FLAVOR
COPY docker/steps/sources.sh docker/steps/closure.py /build/
RUN --mount=type=bind,source=docker/wheels,target=/wheels \
    --mount=type=cache,target=/pip-cache \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_cert \
    PIP_CACHE_DIR=/pip-cache /build/sources.sh "/build/$FLAVOR.txt"


# For sites without internet: docker/build.sh wheelhouse
FROM sources AS fetch
COPY docker/steps/fetch.sh /build/
RUN --mount=type=bind,source=docker/wheels,target=/wheels \
    --mount=type=cache,target=/pip-cache \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_cert \
    PIP_CACHE_DIR=/pip-cache /build/fetch.sh

FROM scratch AS wheelhouse
COPY --from=fetch /wheelhouse /


FROM ${BUILD_BASE}${BUILD_DIGEST} AS compiler-base
ARG PYTHON
COPY docker/steps/system.sh /build/
RUN /build/system.sh build "$PYTHON"

# nvcc, and the torch to build for.
FROM compiler-base AS builder
ARG PYTHON
COPY --from=installer /opt/pip /opt/pip
COPY docker/steps/locked.sh docker/steps/lock-part.sh docker/steps/wheel.sh /build/
RUN --mount=type=bind,from=sources,source=/sources/torch,target=/wheels \
    PIP_NO_INDEX=1 /build/locked.sh "$PYTHON" /wheels/lock.txt


# DS_ACCELERATOR: without a GPU in sight DeepSpeed would build its CPU optimizer under the same name.
# One architecture below 8 in the list would switch DeepSpeed's bf16 off for all of them.
# CPU Adam is left to the first use: it is compiled for the CPU that it runs on.
FROM builder AS wheel-deepspeed
ARG FLAVOR
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"
RUN --mount=type=bind,from=sources,source=/sources/deepspeed,target=/wheels \
    if [ "$FLAVOR" = cpu ]; then export DS_ACCELERATOR=cpu; \
    else export DS_ACCELERATOR=cuda DS_BUILD_FUSED_ADAM=1 DS_BUILD_UTILS=1; fi \
    && /build/wheel.sh


# FORCE_BUILD: its setup.py would otherwise look on the web for a wheel that somebody built, without a hash.
FROM builder AS wheel-flash-attn-1
ARG MAX_JOBS=
ARG NVCC_THREADS=2
ARG FLASH_ATTN_CUDA_ARCHS="80;90;100"
RUN --mount=type=bind,from=sources,source=/sources/flash-attn,target=/wheels \
    FLASH_ATTENTION_FORCE_BUILD=TRUE /build/wheel.sh

FROM python-base AS wheel-flash-attn-0
RUN mkdir /out

# hadolint ignore=DL3006  # a stage above
FROM wheel-flash-attn-${WITH_FLASH_ATTN} AS wheel-flash-attn


# Hopper's own kernels. Not on PyPI: a wheel that lies in docker/wheels, by its hash.
FROM python-base AS wheel-fa3-1
ARG FA3_SHA256=
COPY docker/steps/fa3.sh /build/
RUN --mount=type=bind,source=docker/wheels,target=/wheels /build/fa3.sh "$FA3_SHA256"

FROM python-base AS wheel-fa3-0
RUN mkdir /out

# hadolint ignore=DL3006  # a stage above
FROM wheel-fa3-${WITH_FA3} AS wheel-fa3


FROM environment AS wheel-sft-job
COPY pyproject.toml README.md LICENSE /src/
COPY slurm /src/slurm
COPY sft_job /src/sft_job
RUN /opt/pip/bin/pip --python /opt/venv/bin/python wheel --no-index --no-deps \
    --no-build-isolation --wheel-dir /out /src


FROM python-base AS final
# Named, for programs that ask; a home that does not exist cannot be relied on.
RUN groupadd --gid 10001 sft_job \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin sft_job \
    && mkdir /workspace
COPY --from=environment /opt/venv /opt/venv
# For any user: read by all, changed by nobody. Nothing that a site or a user may want to set
# otherwise: Apptainer lets these win. PYTORCH_VERSION is left out, at which Pyxis sets RANK.
# The driver that is needed is that of CUDA 12.0.
ARG FLAVOR
ARG WITH_FLASH_ATTN
ARG WITH_FA3
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    VIRTUAL_ENV=/opt/venv \
    PYTHONUNBUFFERED=1 \
    PYTHONNOUSERSITE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA="cuda>=12.0" \
    SFT_JOB_FLAVOUR=$FLAVOR \
    WITH_FLASH_ATTN=$WITH_FLASH_ATTN \
    WITH_FA3=$WITH_FA3
RUN --mount=type=bind,from=environment,source=/opt/pip,target=/opt/pip \
    --mount=type=bind,from=wheel-deepspeed,source=/out,target=/built/deepspeed \
    --mount=type=bind,from=wheel-flash-attn,source=/out,target=/built/flash-attn \
    --mount=type=bind,from=wheel-fa3,source=/out,target=/built/fa3 \
    find /built -name '*.whl' -exec /opt/pip/bin/pip --python /opt/venv/bin/python install \
        --no-index --no-deps --no-cache-dir {} +
COPY configs /opt/sft_job/configs
COPY data /opt/sft_job/data
RUN --mount=type=bind,from=environment,source=/opt/pip,target=/opt/pip \
    --mount=type=bind,from=wheel-sft-job,source=/out,target=/built \
    /opt/pip/bin/pip --python /opt/venv/bin/python install --no-index --no-deps --no-cache-dir \
        /built/*.whl

ARG FINAL_BASE
ARG FINAL_DIGEST
ARG BUILD_BASE
ARG BUILD_DIGEST
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
COPY docker/locks/${FLAVOR}.txt /opt/sft_job/locks/
COPY docker/entrypoint.sh docker/environment.sh docker/help.txt docker/check_image.py \
    docker/steps/record.py /opt/sft_job/
# The modes of a checkout are its owner's: read by all, whatever their umask was.
RUN chmod -R a+rX /opt/sft_job \
    && python /opt/sft_job/check_image.py "$FLAVOR" && python /opt/sft_job/record.py

LABEL org.opencontainers.image.title="sft_job" \
    org.opencontainers.image.description="Full-parameter fine-tuning of LLaMA-family chat models" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION" \
    org.opencontainers.image.created="$CREATED" \
    org.opencontainers.image.source="$SOURCE" \
    org.opencontainers.image.base.name="$FINAL_BASE" \
    org.opencontainers.image.base.digest="$FINAL_DIGEST" \
    sft_job.version="$VERSION" \
    sft_job.flavor="$FLAVOR"
WORKDIR /workspace
USER 10001:10001
STOPSIGNAL SIGTERM
# tini: as process 1, sft-job would not be sent signals that it has no handler for, nor bury children.
ENTRYPOINT ["/usr/bin/tini", "-g", "--", "/opt/sft_job/entrypoint.sh"]
CMD []
