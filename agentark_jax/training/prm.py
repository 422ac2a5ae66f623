"""The files of a process reward model: a model directory with its head, what it was trained on and with.

`head.safetensors` holds the head (`models.heads`), `projector.safetensors` the projector where the loss has one, and
`prm.json`, which is written last, tells what all of it is: a directory without it is not finished.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from agentark_jax.data.chat import make_format
from agentark_jax.data.config import PromptConfig
from agentark_jax.data.render import Format
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.files import atomic_path, write_json
from agentark_jax.models.config import ModelConfig, load_config
from agentark_jax.models.heads import HEAD_FILE, Head, init_head, load_heads, save_heads
from agentark_jax.models.transformer import Params, param_shapes
from agentark_jax.models.weights import file_sha256, load_params, weights_fingerprint
from agentark_jax.objectives.prm import HEAD, PRM, PROJECTOR, Projector, init_projector
from agentark_jax.records import stable_hash
from agentark_jax.training.mesh import param_shardings

PROJECTOR_FILE, CARD_FILE = "projector.safetensors", "prm.json"


@dataclass(frozen=True)
class Card:
    """What a process reward model is.

    Attributes:
        tokenizer: the hash of the tokenizer whose ids it reads.
        template: `Format.hash` of the prompts it was trained with, which `prompt` makes.
        labels: the source of the labels of steps.
        coefficients, temperature: of the loss.
        made_from: hash of all that the parameters depend on.
        counts: of the examples: see `data.steps.coverage`.
        published: where it learned from published labels: the dataset, its files' hashes, how questions were divided,
            and `questions`, those it has learned, as `data.first_errors.question_name` calls them.
    """

    tokenizer: str
    template: str
    prompt: PromptConfig
    labels: str
    coefficients: Mapping[str, float]
    temperature: float
    made_from: str
    counts: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)

    def check_tokenizer(self, tokenizer: str, whose: str) -> None:
        """Raises UsageError where a text's ids are those of another tokenizer; `whose` text, in words."""
        if tokenizer != self.tokenizer:
            raise UsageError(
                f"{whose}: its ids are of the tokenizer {tokenizer}, but the process reward model was trained with "
                f"{self.tokenizer}, to which they mean something else. Train one that starts from the model that speaks"
            )


@dataclass(frozen=True)
class RewardModel:
    """A process reward model in memory; `params` and `head` score steps (`training.scoring`)."""

    config: ModelConfig
    params: Params
    head: Head
    form: Format
    card: Card


def load_prm(directory: Path, mesh: Mesh, dtype: str = "float32") -> RewardModel:
    """The process reward model of a directory, on a mesh, its matrices in `dtype` (the head stays in float32).

    Raises UsageError where the directory has none, or a part of it is not what `prm.json` tells, and as `load_params`.
    """
    card, config = read_card(directory), load_config(directory)
    form = make_format(directory, card.prompt, embeddings=config.vocab_size)
    if form.hash != card.template:
        raise UsageError(
            f"{directory / CARD_FILE}: key template: {card.template} is not the hash of the prompts that are made here "
            f"({form.hash}), so scores would mean nothing. Restore the directory's tokenizer files and chat template"
        )
    head = load_heads(directory, config).get("prm")
    if head is None:
        raise UsageError(f"{directory / HEAD_FILE}: has no head `prm`; train a process reward model first")
    shardings = param_shardings(mesh, flatten_dict(param_shapes(config), sep="."))
    params = load_params(directory, config, dtype, unflatten_dict(shardings, sep="."))
    return RewardModel(config, params, head, form, card)


def read_card(directory: Path) -> Card:
    """What the process reward model of a directory is. Raises UsageError where there is none, or it is damaged."""
    path = directory / CARD_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Card(**{**values, "prompt": PromptConfig(**values["prompt"])})
    except FileNotFoundError:
        raise UsageError(
            f"{path}: not found, so this is no finished process reward model; train one, or give the directory of one"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path}: not readable ({error!r}); train the process reward model again") from error


def write_card(directory: Path, card: Card) -> None:
    """Says that the process reward model of a directory is finished. Raises AgentArkError as `write_json`."""
    write_json(directory / CARD_FILE, asdict(card))


def prm_fingerprint(directory: Path) -> str:
    """Identity of a process reward model: a hash (24 hex digits) of its model's files and what stands beside them."""
    beside = [directory / name for name in (HEAD_FILE, PROJECTOR_FILE) if (directory / name).is_file()]
    return stable_hash([weights_fingerprint(directory), [[path.name, file_sha256(path)] for path in beside]])


def load_beside(directory: Path, config: ModelConfig, objective: PRM, seed: int) -> dict[str, Any]:
    """What is trained beside the parameters of a model directory: HEAD and, for a loss that projects, PROJECTOR.

    What the directory has goes on from there; what it lacks is fresh, drawn from the seed.

    Raises UsageError for files that do not belong to the model, AgentArkError for such as cannot be read.
    """
    heads = load_heads(directory, config) if (directory / HEAD_FILE).is_file() else {}
    beside: dict[str, Any] = {HEAD: heads["prm"] if "prm" in heads else init_head(config, "prm", seed)}
    if "supervised_contrastive" in objective.coefficients:
        path = directory / PROJECTOR_FILE
        fresh = init_projector(config.hidden_size, seed + 1)
        beside[PROJECTOR] = _load_projector(path, fresh) if path.is_file() else fresh
    return beside


def save_beside(directory: Path, beside: Mapping[str, Any]) -> None:
    """Writes HEAD and, where there is one, PROJECTOR into a model directory. Raises AgentArkError as `save_heads`.

    With several processes all may call this; the first one writes.
    """
    host = jax.tree.map(np.asarray, dict(beside))
    if jax.process_index() > 0:
        return
    save_heads(directory, {"prm": host[HEAD]})
    if PROJECTOR in host:
        with atomic_path(directory / PROJECTOR_FILE) as temporary:
            save_file(flatten_dict(host[PROJECTOR], sep="."), temporary)
            temporary.chmod(0o644)  # safetensors makes its files private


def _load_projector(path: Path, fresh: Projector) -> Projector:
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AgentArkError(f"{path}: not a readable safetensors file ({error}); restore it from its source") from error
    expected = {name: leaf.shape for name, leaf in flatten_dict(fresh, sep=".").items()}
    shapes = {name: leaf.shape for name, leaf in found.items()}
    if shapes != expected:
        raise UsageError(f"{path}: its tensors are {shapes}, expected {expected}; it does not belong to this model")
    return unflatten_dict({name: jax.numpy.asarray(leaf) for name, leaf in found.items()}, sep=".")
