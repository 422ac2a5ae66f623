"""What one seed's run came to, read back from its directory: no model, no task and nothing computed on a device.

`stages.json` in that directory lists the finished stages in their order with their fingerprints, so that folders of
stages which a changed configuration no longer has are not taken for parts of the result.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.evaluation.predictions import Prediction, load_predictions
from agentark_jax.files import write_json
from agentark_jax.records import DEBATER, Question
from agentark_jax.stages import Manifest, read_manifest
from agentark_jax.traces import labels as labelling
from agentark_jax.traces.store import TraceStore

STAGES = "stages.json"
STORE = "traces.sqlite"
QUESTIONS, PREDICTIONS, KEYS = "questions.jsonl", "predictions.jsonl", "keys.json"
_EVALUATE = "evaluate_"


@dataclass(frozen=True)
class Evaluated:
    """One arm's predictions on the held-out questions."""

    arm: str
    manifest: Manifest
    predictions: list[Prediction]


@dataclass(frozen=True)
class Outcome:
    """Everything one seed's run came to; what the report is made from."""

    seed: int
    directory: Path
    questions: dict[str, list[Question]]
    manifests: list[Manifest]
    evaluated: dict[str, Evaluated]
    debated: list[labelling.LabelledTurn]
    evaluated_debate: list[labelling.LabelledTurn]
    evaluated_vote: list[labelling.LabelledTurn]
    judged: dict[str, Manifest]


def outcome_of(seed: int, directory: Path, manifests: Sequence[Manifest], store: TraceStore) -> Outcome:
    """What the stages of a run and its store hold.

    Raises: AgentArkError where the store lacks a turn that a stage lists.
    """
    stages = {manifest.stage: manifest for manifest in manifests}
    measured = {name.removeprefix(_EVALUATE): stage for name, stage in stages.items() if name.startswith(_EVALUATE)}
    evaluated = {
        name: Evaluated(name, stage, load_predictions(stage.directory / PREDICTIONS))
        for name, stage in measured.items()
        if (stage.directory / PREDICTIONS).exists()
    }

    def said_in(stage: Manifest, role: str | None = None) -> list[labelling.LabelledTurn]:
        keys = json.loads((stage.directory / KEYS).read_text())
        return labelling.labelled_turns(store, stage.config["grader"], keys=keys, role=role)

    return Outcome(
        seed,
        directory,
        _load_questions(stages["questions"].directory / QUESTIONS),
        list(manifests),
        evaluated,
        said_in(stages["debate"], DEBATER),
        said_in(measured["debate"], DEBATER),
        said_in(measured["vote"]),
        {name: stage for name, stage in measured.items() if name not in evaluated},
    )


def save_stages(directory: Path, manifests: Sequence[Manifest]) -> None:
    """Write the list of a finished run's stages."""
    write_json(directory / STAGES, {manifest.stage: manifest.fingerprint for manifest in manifests})


def load_outcome(seed: int, directory: Path) -> Outcome:
    """The outcome of a finished run, each of its files checked against the manifests; models may be gone.

    Raises:
        UsageError: the run did not finish.
        AgentArkError: a file is missing, damaged or changed.
    """
    path = directory / STAGES
    if not path.exists():
        raise UsageError(f"{path}: missing, so this run did not finish. Finish it with `agentark run`.")
    try:
        listed = json.loads(path.read_text())
        if not isinstance(listed, Mapping):
            raise ValueError("it is not a mapping")
        for stage in listed:
            if Path(stage).name != stage:
                raise ValueError(f"{stage!r} is no stage of this directory")
    except (OSError, ValueError) as error:
        raise AgentArkError(f"{path}: damaged ({error}). Run `agentark run` again, it writes that file.") from error
    manifests = [_finished(directory / stage, fingerprint) for stage, fingerprint in listed.items()]
    with TraceStore(directory / STORE, read_only=True) as store:
        return outcome_of(seed, directory, manifests, store)


def _finished(directory: Path, fingerprint: Any) -> Manifest:
    manifest = read_manifest(directory, models=False)
    if manifest is None or manifest.fingerprint != fingerprint:
        found = "not finished" if manifest is None else f"another ({manifest.fingerprint}) than the run had"
        raise UsageError(f"{directory}: this stage is {found}: finish the run with `agentark run`.")
    return manifest


def _load_questions(path: Path) -> dict[str, list[Question]]:
    """The questions of a run by split, in their order."""
    splits: dict[str, list[Question]] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            question = Question(**json.loads(line))
            splits.setdefault(question.split, []).append(question)
    return splits
