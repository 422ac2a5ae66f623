# agentark on CPU: debates on servers elsewhere, merging of traces, evaluation of small models, reports.
#
#   docker build -f launch/docker/cpu.Dockerfile -t agentark:cpu .
#   docker run --rm -v "$PWD/runs:/runs" agentark:cpu run --config configs/quickstart.yaml --root /runs
#
# The folder at /runs must be writable to user 1000. Secrets (HF_TOKEN, AGENTARK_SGLANG_TOKEN) are given when it runs,
# with -e, and are never part of the image. Verified: linted, not built.
FROM python:3.11.13-slim-bookworm

RUN useradd --uid 1000 --create-home agentark && install -d -o agentark /runs
WORKDIR /app
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# What it depends on first: this layer is made anew only where pyproject.toml changes, which has the bounds of versions.
COPY pyproject.toml README.md ./
# hadolint ignore=DL3013
RUN mkdir agentark_jax && touch agentark_jax/__init__.py && pip install '.[quickstart,gs,s3]'
COPY agentark_jax agentark_jax
COPY configs configs
RUN pip install --no-deps --force-reinstall .

USER 1000
ENTRYPOINT ["agentark"]
CMD ["--help"]
