# agentark on the hosts of a TPU slice: the image of launch/gke_tpu.sh. libtpu comes with jax[tpu].
#
#   docker build -f launch/docker/tpu.Dockerfile -t REGION-docker.pkg.dev/PROJECT/REPOSITORY/agentark:tpu .
#   docker push REGION-docker.pkg.dev/PROJECT/REPOSITORY/agentark:tpu
#
# As for /runs and secrets see cpu.Dockerfile. Verified: linted, not built.
FROM python:3.11.13-slim-bookworm

RUN useradd --uid 1000 --create-home agentark && install -d -o agentark /runs
WORKDIR /app
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# What it depends on first: this layer is made anew only where pyproject.toml changes, which has the bounds of versions.
COPY pyproject.toml README.md ./
# hadolint ignore=DL3013
RUN mkdir agentark_jax && touch agentark_jax/__init__.py && pip install '.[tpu,gs]'
COPY agentark_jax agentark_jax
COPY configs configs
RUN pip install --no-deps --force-reinstall .

USER 1000
ENTRYPOINT ["agentark"]
CMD ["--help"]
