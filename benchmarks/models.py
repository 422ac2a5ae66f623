"""Models of published shapes with random weights, for benchmarks that need a size and no knowledge."""

from pathlib import Path
from tempfile import TemporaryDirectory

from agentark_jax.cache import cache_root
from agentark_jax.errors import UsageError
from agentark_jax.files import write_json
from agentark_jax.models.config import load_config
from agentark_jax.models.published import PUBLISHED
from agentark_jax.models.transformer import init_params
from agentark_jax.models.weights import save_pretrained

SEED = 0


def random_model(name: str, root: Path | None = None) -> Path:
    """A directory in Hugging Face format (no tokenizer) with fp32 weights drawn from seed 0, made on first use.

    `name` is a key of `models.published`; a billion parameters take 4 GB below `root` (default: the cache directory).
    Raises UsageError for another name, AgentArkError when the directory cannot be written.
    """
    if name not in PUBLISHED:
        raise UsageError(f"there is no published shape {name!r}; choose among {', '.join(PUBLISHED)}")
    directory = (cache_root() if root is None else root) / "random" / f"{name.replace('/', '--')}-seed{SEED}"
    if directory.exists():  # it appears only when it is complete
        return directory
    with TemporaryDirectory() as source:
        write_json(Path(source) / "config.json", dict(PUBLISHED[name]))
        config = load_config(Path(source))
        return save_pretrained(directory, config, init_params(config, SEED), Path(source))
