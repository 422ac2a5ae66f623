"""What is kept between runs, whatever they are: converted models and compiled programs."""

import logging
import os
from pathlib import Path

import jax


def cache_root() -> Path:
    """Where both are kept: $AGENTARK_CACHE, or `agentark_jax` in the user's cache directory."""
    root = os.environ.get("AGENTARK_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "agentark_jax"


def enable_compilation_cache() -> None:
    """Keep compiled programs between processes; the second run of a command does not compile."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.WARNING)
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
