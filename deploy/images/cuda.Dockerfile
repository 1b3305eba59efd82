# Kvist on NVIDIA GPUs, with the embedded model and Mooncake over TCP. From the root of the repository, with a wheel in
# dist/; the host needs a driver for CUDA 13 and NVIDIA's container toolkit:
#
#     docker build -f deploy/images/cuda.Dockerfile -t kvist:cuda .
#     docker run --gpus all --shm-size 8g -p 127.0.0.1:30000:30000 kvist:cuda
#
# CUDA's libraries are packages of the list, so the base needs none. It needs Python's headers, for Triton.

# Debian 12 with Python 3.11. The packages below are pinned by hash for it; pin it by digest, too: python@sha256:...
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# where pip finds the packages, if not in its usual index
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
COPY deploy/images/requirements-cuda.txt dist/kvist-*.whl /tmp/
RUN python3 -m venv /opt/kvist \
    && /opt/kvist/bin/pip install --no-cache-dir --no-deps --require-hashes -r /tmp/requirements-cuda.txt \
    && /opt/kvist/bin/pip install --no-cache-dir --no-deps --no-index /tmp/kvist-*.whl \
    && /opt/kvist/bin/pip uninstall --yes --quiet pip

FROM ${BASE}
ARG VERSION=unknown
LABEL org.opencontainers.image.title="kvist" \
      org.opencontainers.image.description="Serves large language models with prefill and decode apart; for NVIDIA GPUs" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# the compiler with which Triton makes the launchers of its kernels, and the libraries of Mooncake
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libibverbs1 libnuma1 librdmacm1 liburing2 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* \
    && groupadd --gid 10001 kvist \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /var/lib/kvist --shell /usr/sbin/nologin kvist
COPY --from=build /opt/kvist /opt/kvist
ENV PATH=/opt/kvist/bin:/usr/local/bin:/usr/bin:/bin HOME=/var/lib/kvist KVIST_HOST=0.0.0.0 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /var/lib/kvist
EXPOSE 30000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ.get(\"KVIST_PORT\", 30000)}/health', timeout=4)"]
ENTRYPOINT ["kvist"]
CMD ["serve"]
