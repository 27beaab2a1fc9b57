# The service as an image: CPU by default, as an unprivileged user, data in /data.
#
#   docker build -t prefix-service .
#   docker run -p 127.0.0.1:8080:8080 -v prefix-data:/data prefix-service
#
# For NVIDIA GPUs take torch from one of PyTorch's CUDA indexes, and start with the NVIDIA container toolkit:
#
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t prefix-service:cuda .
#   docker run --gpus all -p 127.0.0.1:8080:8080 -v prefix-data:/data prefix-service:cuda
#
# Behind a package mirror hand pip's configuration in; neither the image nor its history keeps it:
#
#   docker build --secret id=pip.conf,src=$HOME/.config/pip/pip.conf --build-arg TORCH_INDEX= -t prefix-service .

# Any image with `python3` (3.11 or newer) and its venv module.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
# Where torch comes from; empty: wherever pip is configured to look.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /venv
WORKDIR /source
COPY constraints.txt ./
# Without dependencies: these come with the others, from the usual index at the pinned versions.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /venv/bin/pip install --no-deps ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} --constraint constraints.txt torch
COPY LICENSE README.md pyproject.toml ./
COPY service ./service
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /venv/bin/pip install --constraint constraints.txt '.[fleet,traces]' \
    && /venv/bin/pip uninstall --yes pip
# 145 MB that only who builds torch extensions, or torch itself, has a use for.
RUN rm -rf /venv/lib/python3.*/site-packages/torch/include /venv/lib/python3.*/site-packages/torch/test

FROM ${BASE_IMAGE}
ARG BASE_IMAGE
LABEL org.opencontainers.image.title="prefix-service" \
      org.opencontainers.image.description="Hosts trained prefix-tuning adapters and hands their past_key_values to remote inference workers." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
# The user's number is fixed, so that volumes keep their owner from one image to the next.
RUN groupadd --gid 10001 prefix \
    && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin prefix \
    && install --directory --owner 10001 --group 10001 --mode 0700 /data
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PREFIX_HOST=0.0.0.0 \
    PREFIX_DATA_DIR=/data
# A number, so that Kubernetes' runAsNonRoot can tell.
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-I", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PREFIX_PORT', '8080')), timeout=4); c.request('GET', '/readyz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["prefix-service"]
CMD ["serve"]
