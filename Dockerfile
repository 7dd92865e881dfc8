# The server, for GPUs (--target cuda, the default) and without one (--target cpu).
#
#   docker build --tag kvist:cuda --target cuda .
#   docker run --gpus all -p 127.0.0.1:8000:8000 kvist:cuda
#
# PYTHON names the base image; a release gives it with its digest.
# Every wheel comes with its hash: deploy/lock.py writes the two lists.
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS empty
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /opt/kvist
WORKDIR /source

FROM empty AS packages-cuda
COPY deploy/requirements-cuda.txt requirements.txt
RUN /opt/kvist/bin/pip install --no-deps --require-hashes --only-binary :all: -r requirements.txt

FROM empty AS packages-cpu
COPY deploy/requirements-cpu.txt requirements.txt
RUN /opt/kvist/bin/pip install --no-deps --require-hashes --only-binary :all: -r requirements.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu

FROM packages-cuda AS built-cuda
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY model model
COPY server server
RUN /opt/kvist/bin/pip install --no-deps --no-build-isolation . \
    && /opt/kvist/bin/pip uninstall --yes pip

FROM packages-cpu AS built-cpu
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY model model
COPY server server
RUN /opt/kvist/bin/pip install --no-deps --no-build-isolation . \
    && /opt/kvist/bin/pip uninstall --yes pip

FROM ${PYTHON} AS runtime
RUN groupadd --gid 10001 kvist \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin kvist \
    && install --directory --owner kvist --group kvist /home/kvist/.cache
ENV PATH=/opt/kvist/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    XDG_CACHE_HOME=/home/kvist/.cache \
    TRITON_CACHE_DIR=/home/kvist/.cache/triton \
    KVIST_HOST=0.0.0.0 \
    KVIST_LOG=json
WORKDIR /home/kvist
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["python", "-m", "server", "serve"]

FROM runtime AS cpu
# The CPU's kernels are compiled for the processor that is there, once, into the cache.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=built-cpu /opt/kvist /opt/kvist
USER 10001:10001

FROM runtime AS cuda
# Triton compiles the few lines with which it launches a kernel.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=built-cuda /opt/kvist /opt/kvist
USER 10001:10001
