"""The models of a run and how they are asked: its own, which the stages make, and those of a team."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from agentark_jax.config import RunConfig
from agentark_jax.data.chat import make_format
from agentark_jax.data.config import PromptConfig
from agentark_jax.data.render import Format, Layout
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.generation import Model, Seat
from agentark_jax.models import transformer
from agentark_jax.models.config import load_config
from agentark_jax.models.gguf import resolve_model
from agentark_jax.models.weights import weights_fingerprint
from agentark_jax.protocols.config import AgentConfig
from agentark_jax.stages import MANIFEST, Manifest


@dataclass(frozen=True)
class Agents:
    """Who debates: the base, the team's own models where it has any, and a seat for each agent."""

    base: Manifest
    team: Manifest | None
    seats: tuple[Seat, ...]

    @property
    def inputs(self) -> dict[str, Manifest]:
        """The stages that their answers depend on."""
        return {"base": self.base} if self.team is None else {"base": self.base, "team": self.team}


class Cast:
    """Who plays in a run. No weight is read here."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._formats: dict[tuple[Path, PromptConfig], Format] = {}  # reading a large tokenizer takes seconds

    def layout(self) -> Layout:
        """How later rounds show what was said; the warm start teaches what the debate then uses."""
        settings = self._config.debate
        return Layout(named=settings.named, shared_first=settings.layout == "shared_first")

    def form(self, raw: Manifest) -> Format:
        """How the run's own models are asked; they all have the raw model's tokenizer."""
        return self._format(model_directory(raw), self._config.prompt)

    def model(self, stage: Manifest, form: Format) -> Model:
        """The model a stage made or found."""
        directory = model_directory(stage)
        name = self._config.model.source
        return Model(name, directory, stage.counts["revision"], load_config(directory), form)

    def judge(self, found: Manifest, form: Format) -> Model:
        """The model that process reward models start from in the place of the student. Raises as `reads`."""
        directory = model_directory(found)
        own = self.reads(directory, form)
        assert self._config.prm.model is not None, "somebody found it"
        return Model(self._config.prm.model, directory, found.counts["revision"], load_config(directory), own)

    def reads(self, directory: Path, form: Format) -> Format:
        """How the model of `prm.model` is asked. Raises UsageError if not in the ids in which the run's own models
        (`form`) are: what they say would mean something else to it."""
        own = self._format(directory, self._config.prompt)
        for what, theirs, ours, fix in (
            ("tokenizer", own.tokenizer.hash, form.tokenizer.hash, "take a model of the same family"),
            ("prompts", own.hash, form.hash, "give its directory the run's chat template, or set prompt.format plain"),
        ):
            if theirs != ours:
                raise UsageError(
                    f"prm.model: {directory} has other {what} ({theirs}) than model.source {self._config.model.source} "
                    f"({ours}), so it cannot judge step by step what that says: {fix}."
                )
        return own

    def seat(self, model: Model) -> Seat:
        """One of the run's own models, alone."""
        return Seat(model, tuple(self._config.engine.servers))

    def seats(self, base: Model, team: Manifest | None) -> tuple[Seat, ...]:
        """Who answers for the agents: the team, or the base for all of them."""
        return tuple(self._member(member, base, team) for member in self._config.team) or (self.seat(base),)

    def tokenizers(self, form: Format) -> list[Tokenizer]:
        """Those of all who may have spoken: the run's own, and those of a team that has sat down."""
        found = {each.tokenizer.hash: each.tokenizer for each in (form, *self._formats.values())}
        return list(found.values())

    def team_slice(self) -> dict[str, Any]:
        """What of the team the agents' calls depend on."""
        return {"team": [member.fingerprint() for member in self._config.team]} if self._config.team else {}

    def _member(self, member: AgentConfig, base: Model, team: Manifest | None) -> Seat:
        model, servers = base, self._config.engine.servers
        if member.model is not None:
            assert team is not None, "a team with models of its own has found them"
            found: Mapping[str, Any] = team.counts["models"][member.model]
            servers = []
            directory = Path(found["location"])
            form = self._format(directory, member.prompt or self._config.prompt)
            model = Model(member.model, directory, found["revision"], load_config(directory), form)
        elif member.prompt is not None:
            model = replace(base, form=self._format(base.directory, member.prompt))
        servers = servers if member.servers is None else member.servers
        return Seat(model, tuple(servers), member.api, member.served, member.temperature)

    def _format(self, directory: Path, prompt: PromptConfig) -> Format:
        key = directory, prompt
        if key not in self._formats:
            self._formats[key] = make_format(directory, prompt, embeddings=load_config(directory).vocab_size)
        return self._formats[key]


def model_directory(stage: Manifest) -> Path:
    """Where the model of a stage lies; absolute where it is not the stage's own."""
    return stage.directory / stage.counts["location"]


def check_found(stage: Manifest) -> None:
    """Raises AgentArkError where a model that lies outside the run is not any more what it was when it was found.

    Those that a stage made are compared by it, file by file (`stages.Run`).
    """
    directory = model_directory(stage)
    if directory.is_relative_to(stage.directory):
        return
    if weights_fingerprint(directory) != stage.counts["revision"]:
        raise AgentArkError(
            f"{directory}: the config, weights or tokenizer there are not those that this run began with. Restore "
            f"them, or choose another --name; {stage.directory / MANIFEST} has the hash of what they were."
        )


def find_model(source: str, prompt: PromptConfig, *, weights: bool = True) -> tuple[Model, dict[str, Any]]:
    """A model that no stage made, by its directory or hub id, asked as `prompt` says; and its `identity`.

    Raises UsageError where there is none, or one that cannot be used.
    """
    directory = resolve_model(source, weights=weights).resolve()
    config = load_config(directory)
    form = make_format(directory, prompt, embeddings=config.vocab_size)
    # A directory may have got other weights since the last time.
    found = identity(directory, str(directory), weights=weights)
    return Model(source, directory, found["revision"], config, form), found


def identity(directory: Path, location: str, *, weights: bool = True) -> dict[str, Any]:
    """What the artefact of a model that was found says: the hash of its files, where they are, and how large it is.

    Without `weights`, which servers may have alone, the hash is that of what it is asked with.
    """
    shapes = transformer.param_shapes(load_config(directory))
    revision = weights_fingerprint(directory) if weights else Tokenizer(directory).hash
    return {"revision": revision, "location": location, "parameters": size(shapes)}


def size(params: transformer.Params) -> int:
    """How many numbers parameters, or the shapes of some, have."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
