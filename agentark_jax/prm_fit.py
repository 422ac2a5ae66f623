"""A process reward model of labels that somebody has published, without a debate."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentark_jax.config import PRMRun, flat
from agentark_jax.data.first_errors import OtherText, Solution, drawn, held_out, question_name, solution_example
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.files import write_json
from agentark_jax.generation import Model
from agentark_jax.models.weights import file_sha256
from agentark_jax.process import train_prm
from agentark_jax.progress import Display
from agentark_jax.records import Example
from agentark_jax.stages import Work
from agentark_jax.training.prm import CARD_FILE

SETTINGS, RESULTS, STAGES = "fit.json", "results.json", "stages"


@dataclass(frozen=True)
class Published:
    """What is learned, and how it is divided.

    Attributes:
        dataset: whose format the files have; "own" for ours.
        files: with solutions.
        held_out: about this share of the questions is kept from training.
        limit: train on so many solutions at most.
        seed: of what is held out, what is drawn, and of the training.
    """

    dataset: str
    files: tuple[Path, ...]
    held_out: float
    limit: int | None
    seed: int

    def to_json(self) -> dict[str, Any]:
        """What the model depends on; files by name and content, wherever they lie."""
        files = [{"name": path.name, "sha256": file_sha256(path)} for path in self.files]
        return {**asdict(self), "files": files}


def divide(solutions: Sequence[Solution], data: Published) -> tuple[list[Solution], list[Solution]]:
    """The solutions to learn from, at most `data.limit`, and those of questions that are held out, in file order."""
    kept = [each for each in solutions if held_out(each, data.held_out, data.seed)]
    rest = [each for each in solutions if not held_out(each, data.held_out, data.seed)]
    return [rest[index] for index in drawn(rest, data.limit, data.seed, whole=True)], kept


def is_learned(solution: Solution, published: Mapping[str, Any]) -> bool:
    """Whether a model has learned a solution's question, or one that it is a variant of (`training.prm.Card`)."""
    return not {solution.source, question_name(solution.question)}.isdisjoint(published.get("questions", ()))


def fit_published(
    out: Path, config: PRMRun, model: Model, data: Published, solutions: Sequence[Solution], display: Display
) -> dict[str, Any]:
    """Trains a process reward model that `load_prm` reads from `out`; counts of what it was trained on.

    What is there already, finished or half done, is gone on with where all settings are the same. `out` gets the model,
    `fit.json` (the settings), and in `stages/` what training logged.

    Args:
        solutions: to learn from. Those with more tokens than a row, or than the model takes, are left out and counted.

    Raises UsageError where `out` was made with other settings or is something else, or no solution fits into a row, and
    as `process.train_prm`.
    """
    settings = {
        "model": model.revision,
        "template": model.form.hash,
        "data": data.to_json(),
        "prompt": asdict(config.prompt),
        "prm": config.prm.fingerprint(),
    }
    _claim(out, settings)
    work = Work(out / STAGES)
    if not (out / CARD_FILE).is_file():
        examples, learned, work.counts = _examples(config, model, solutions, display)
        work.directory.mkdir(exist_ok=True)
        published = {**data.to_json(), "questions": sorted(learned)}
        made = train_prm(
            work,
            config.prm,
            model,
            config.prompt,
            examples,
            labels=published["dataset"],
            seed=data.seed,
            display=display,
            published=published,
        )
        write_json(out / SETTINGS, {**settings, "counts": work.counts})
        _deliver(made, out)
    for stage in work.directory.glob("*/model"):
        shutil.rmtree(stage)
    counts: dict[str, Any] = json.loads((out / SETTINGS).read_text(encoding="utf-8"))["counts"]
    return counts


def _examples(
    config: PRMRun, model: Model, solutions: Sequence[Solution], display: Display
) -> tuple[list[Example], set[str], dict[str, Any]]:
    """What is learned from solutions, the names of their questions, and counts of what is left out."""
    fits = {"prm.frozen": config.prm.frozen, "prm.whole": config.prm.whole}
    limits = {f"{key}.row_length": fit.row_length for key, fit in fits.items() if fit is not None}
    limits["the model's positions"] = model.config.max_positions
    shortest = min(limits, key=lambda key: limits[key])
    examples: list[Example] = []
    learned: set[str] = set()
    counts = {"solutions": len(solutions), "too_long": 0, "unknown_steps": 0, "without_steps": 0, "other_text": 0}
    with display.bar("cut steps", total=len(solutions)) as bar:
        for solution in solutions:
            bar.more(1)
            try:
                example, unknown = solution_example(model.form, solution)
            except OtherText:
                counts["other_text"] += 1
                continue
            if example is None:
                counts["without_steps"] += 1
            elif len(example.ids) > limits[shortest]:
                counts["too_long"] += 1
            else:
                counts["unknown_steps"] += unknown
                examples.append(example)
                learned |= {solution.source, question_name(solution.question)}
    if not examples:
        raise UsageError(
            f"--data: none of {len(solutions):,} solutions can be learned from; {counts['too_long']:,} are longer than "
            f"{shortest}, {limits[shortest]:,} tokens. Raise that, or give other data or a smaller --held_out."
        )
    return examples, learned, counts


def _claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Says in an empty directory what is made there; raises UsageError where something else is."""
    path = out / SETTINGS
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            before, now = flat(found), flat(json.loads(json.dumps(settings)))
        except (ValueError, AttributeError) as error:
            raise AgentArkError(f"{path}: damaged ({error}); delete {out} or give another --out.") from error
        for key in sorted(before.keys() | now.keys()):
            if not key.startswith("counts.") and before.get(key) != now.get(key):
                raise UsageError(
                    f"{out} was made with other settings: {path}: {key} is {before.get(key)}, and would be "
                    f"{now.get(key)}. Give another --out, or delete the directory."
                )
        return
    others = sorted(each.name for each in out.iterdir() if not each.name.startswith("lock"))
    if others:
        raise UsageError(
            f"--out {out}: holds {others[0]}, which is not from `prm fit`; give an empty or a new directory."
        )
    write_json(path, dict(settings))


def _deliver(model: Path, out: Path) -> None:
    """The finished model's files also in `out`, the card last; they take no more space."""
    names = sorted((each.name for each in model.iterdir()), key=lambda name: (name == CARD_FILE, name))
    for name in names:
        temporary = out / f".{name}.partial"
        temporary.unlink(missing_ok=True)
        try:
            os.link(model / name, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(model / name, temporary)
        os.replace(temporary, out / name)
