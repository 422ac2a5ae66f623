"""The directory of a run or an evaluation: whose configuration it has, and what is told of its stages."""

import time
from collections.abc import Callable, Sequence

import yaml

from agentark_jax import config as configuration
from agentark_jax.config import EvaluateRun, RunConfig
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.files import write_text
from agentark_jax.progress import Display
from agentark_jax.stages import Manifest

CONFIG = "config.yaml"
# Stages in which nothing is trained or generated yet.
_PREPARED = {"raw_model", "model", "questions", "prm_model"}


def announcer(display: Display) -> Callable[[Manifest], None]:
    """Tells of every stage as it is done, or found to be."""

    def announce(manifest: Manifest) -> None:
        state = "up to date" if manifest.reused else f"{manifest.seconds:,.1f} s"
        display.say(f"[green]✓[/green] {manifest.stage:24} {state:>12}  [dim]{manifest.fingerprint}[/dim]")

    return announce


def tell_work(display: Display, manifests: Sequence[Manifest], started: float, idle: str) -> None:
    """Tells how many stages were made since `started` (`time.monotonic`), and how fast; or that nothing was `idle`."""
    built = [manifest for manifest in manifests if not manifest.reused]
    seconds = time.monotonic() - started
    if built:
        tokens = sum(manifest.tokens for manifest in built)
        display.say(f"{len(built)} stages in {seconds:,.0f} s, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s.")
    else:
        display.say(f"Everything was up to date: nothing was {idle} ({seconds:.1f} s).")


def keep_config(config: RunConfig | EvaluateRun, *, update: bool) -> None:
    """Write the resolved configuration into the directory. Raises as `check_same_config`."""
    check_same_config(config, update=update)
    write_text(config.directory / CONFIG, configuration.to_yaml(config))


def check_same_config(config: RunConfig | EvaluateRun, *, update: bool) -> None:
    """Refuse a run directory that was made with another configuration.

    One in which nothing was trained or generated yet, such as that of a run that was refused, may change its mind.
    """
    path = config.directory / CONFIG
    made = {manifest.parent.name for manifest in config.directory.rglob("manifest.json")}
    if update or not path.exists() or made <= _PREPARED:
        return
    try:
        before = yaml.safe_load(path.read_text())
        if not isinstance(before, dict):
            raise ValueError("it is not a mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AgentArkError(f"{path}: damaged ({error}). Delete it to go on in this directory.") from error
    old, new = configuration.flat(before), configuration.flat(configuration.as_dict(config))
    changed = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not configuration.is_free(key)
    ]
    if changed:
        shown = ", ".join(f"{key} ({old.get(key)} → {new.get(key)})" for key in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UsageError(
            f"{path}: this directory was made with another configuration; different: {shown}{more}. Choose another "
            "--name, or pass --update to redo what depends on the difference and reuse the rest."
        )
