# agentark on NVIDIA GPUs. CUDA itself comes with jax's wheels; the host has the driver and the container toolkit.
#
#   docker build -f launch/docker/cuda.Dockerfile -t agentark:cuda .
#   docker run --rm --gpus all -v /shared/runs:/runs agentark:cuda run --config configs/qwen3_8b.yaml --root /runs
#
# SGLang servers have an image of their own (lmsysorg/sglang:v0.5.23): their dependencies clash with these. As for /runs
# and secrets see cpu.Dockerfile. Verified: linted, not built.
FROM python:3.11.13-slim-bookworm

RUN useradd --uid 1000 --create-home agentark && install -d -o agentark /runs
WORKDIR /app
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# What it depends on first: this layer is made anew only where pyproject.toml changes, which has the bounds of versions.
COPY pyproject.toml README.md ./
# hadolint ignore=DL3013
RUN mkdir agentark_jax && touch agentark_jax/__init__.py && pip install '.[cuda,gs,s3]'
COPY agentark_jax agentark_jax
COPY configs configs
RUN pip install --no-deps --force-reinstall .

USER 1000
ENTRYPOINT ["agentark"]
CMD ["--help"]
