"""Questions that are read: a known dataset or a user's own, cut into the splits of a run.

A dataset's splits follow from the questions alone. The hash of a question, or of what several have in common (their
paper, the question they rephrase), says to which split it belongs, whatever the seed and however many are asked for; so
no split changes with another's size, and two seeds never train on each other's held-out questions. A user's own
questions may be few, so they are cut one by one into the sizes asked for: held-out ones first, then those of validation
and debate, and from the other end those of the warm start. Asking for more to learn from changes nothing else.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from agentark_jax.errors import UsageError
from agentark_jax.records import Grade, Question, stable_hash
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.datasets import DATASETS, load, stands_for
from agentark_jax.tasks.grading import Grader, grader
from agentark_jax.tasks.items import Item, in_order, make_question
from agentark_jax.tasks.own import read_own
from agentark_jax.tasks.rows import read_file, read_hub
from agentark_jax.tasks.task import SPLITS, check_request

HELD_OUT, DEBATE, WARM_START = "held_out", "debate", "warm_start"
# Of the questions that may be learned from. What is held out elsewhere leaves its share to the debate.
SHARES = {HELD_OUT: 0.2, "validation": 0.05, DEBATE: 0.5, WARM_START: 0.25}
SPLIT_ORDER = tuple(SHARES)


class DrawnTask:
    """The questions of each split, each with the grader of its dataset."""

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Sequence[Question]],
        graders: Mapping[str, Grader],
        counts: Mapping[str, int],
    ) -> None:
        self.name = name
        self.counts = counts
        self._splits = splits
        self._graders = graders
        self.grader_id = "+".join(dict.fromkeys(each.id for each in graders.values()))

    def questions(self, split: str, count: int) -> list[Question]:
        """The first `count` questions of a split. Raises UsageError beyond the size given for it at the start."""
        check_request(split, count)
        given = self._splits[split]
        if count > len(given):
            raise UsageError(
                f"the split {split!r} was given {len(given)} questions of {self.name} (task.path, task.name or "
                f"task.gym), but {count} are asked; raise its number of questions in the config."
            )
        return list(given[:count])

    def grade(self, question: Question, text: str) -> Grade:
        return self._graders[question.task](question, text)


def own_task(config: TaskConfig, sizes: Mapping[str, int]) -> DrawnTask:
    """The questions of a user's file or hub dataset; held-out ones from `task.held_out`, where that is set.

    Raises UsageError where a row cannot be used, or there are fewer different questions than are needed together.
    """
    judge = config.grader or ("choice" if config.fields.choices else "numeric")
    if config.hub is not None:
        where, name = f"{config.hub.id} (task.hub)", config.hub.id
        rows = read_hub(config.hub.id, config.hub.config, config.hub.split)
    else:
        assert config.path is not None, "own questions have a path or a hub id"
        path = Path(config.path)
        where, name = f"{path} (task.path)", "parquet" if path.suffix == ".parquet" else "jsonl"
        rows = read_file(path)
    items, counts = read_own(rows, config.fields, judge)
    graders, asked, measuring = {name: grader(judge)}, dict(sizes), list[Item]()
    if config.held_out is not None:
        tested, test = config.held_out, DATASETS[config.held_out].test
        assert test is not None, "a dataset with a test set"
        loaded = load(tested, test, _beside(config.path, tested), config.seed)
        items, dropped = _apart(items, loaded.items)
        counts = {**counts, "held_out_elsewhere_dropped": dropped}
        counts |= {f"{HELD_OUT}_{reason}": count for reason, count in loaded.counts.items()}
        size = asked.pop(HELD_OUT, 0)
        _check_size(tested, HELD_OUT, size, len(loaded.items))
        measuring = in_order(loaded.items, config.seed)[:size]
        graders[tested] = grader(DATASETS[tested].grader)
    items = in_order(items, config.seed)
    needed = sum(asked.values()) + config.shots
    if needed > len(items):
        wanted = " + ".join(f"{split} {asked[split]}" for split in SPLIT_ORDER if asked.get(split))
        wanted += f" + task.shots {config.shots}" if config.shots else ""
        raise UsageError(
            f"{where} has {len(items)} different questions, but the splits need {needed} ({wanted}). "
            "Add questions to the file or lower the number of questions of these splits in the config."
        )
    backwards = items[::-1]
    examples, backwards = backwards[: config.shots], backwards[config.shots :]
    pieces, start = {WARM_START: backwards[: asked.get(WARM_START, 0)]}, 0
    for split in SPLIT_ORDER[:-1]:
        pieces[split] = items[start : start + asked.get(split, 0)]
        start += len(pieces[split])
    splits = {
        split: [make_question(name, split, item, examples=examples) for item in piece]
        for split, piece in pieces.items()
    }
    if config.held_out is not None:
        line = graders[config.held_out].instruction
        splits[HELD_OUT] = [
            make_question(config.held_out, HELD_OUT, item, instruction=line, examples=examples) for item in measuring
        ]
    return DrawnTask(name, splits, graders, counts)


def dataset_task(config: TaskConfig, sizes: Mapping[str, int]) -> DrawnTask:
    """The questions of a known dataset, held-out ones from its test set or from `task.held_out`.

    Raises UsageError where the dataset may not be learned from, cannot be read, or has too few questions.
    """
    name, tested = config.name, config.held_out or config.name
    dataset, path = DATASETS[name], _place(config.path, name)
    learned = [split for split in SPLITS if split != HELD_OUT and sizes.get(split)]
    if dataset.train is None and (learned or config.shots):
        raise UsageError(
            f"task.name is {name}, a test set: its questions are held out, never learned from, so they cannot be the "
            f"split {' or '.join(learned) or 'of task.shots'}. Set task.name to {dataset.instead} (say), and "
            f"task.held_out to {name}."
        )
    test = DATASETS[tested].test
    # A file by itself is all there is to learn from and to hold out.
    alone = path is not None and not path.is_dir() and dataset.train is not None
    if path is not None and alone and config.held_out:
        raise UsageError(f"task.path: {path} is one file, but {name} and {tested} are two; give their directory.")
    learns = bool(learned or config.shots)
    if path is not None and alone and test is not None and stands_for(test, path):
        if learns:
            raise UsageError(
                f"task.path: {path} has the name of the test questions of {name}, which are never learned from; give "
                "the training file, or the directory of both."
            )
        alone = False
    counts: dict[str, int] = {}
    held_out: list[Item] | None = None
    if test is not None and not alone:
        loaded = load(tested, test, _place(config.path, tested, apart=tested != name), config.seed)
        held_out, counts = loaded.items, {f"{HELD_OUT}_{reason}": count for reason, count in loaded.counts.items()}
    pools: dict[str, list[Item]] = {split: [] for split in SPLITS}
    # Who only measures on a test set need not have the training set.
    if dataset.train is not None and (learns or held_out is None):
        loaded = load(name, dataset.train, path, config.seed)
        items, dropped = _apart(loaded.items, held_out or [])
        counts = {**loaded.counts, "held_out_elsewhere_dropped": dropped, **counts}
        for item in items:
            pools[pool_of(item, held_out is not None)].append(item)
    if held_out is not None:
        pools[HELD_OUT] = held_out
    ordered = {split: in_order(items, config.seed) for split, items in pools.items()}
    # The last of the warm start's: however many of its questions are asked, the examples stay the same.
    cut = max(0, len(ordered[WARM_START]) - config.shots)
    ordered[WARM_START], examples = ordered[WARM_START][:cut], ordered[WARM_START][cut:]
    for split in SPLIT_ORDER:
        _check_size(name if split != HELD_OUT else tested, split, sizes.get(split, 0), len(ordered[split]))
    graders = {task: grader(DATASETS[task].grader) for task in (name, tested)}
    splits = {
        split: [
            make_question(task, split, item, instruction=graders[task].instruction, examples=examples)
            for item in ordered[split][: sizes.get(split, 0)]
        ]
        for split, task in ((split, tested if split == HELD_OUT else name) for split in SPLITS)
    }
    return DrawnTask(name, splits, graders, counts)


def pool_of(item: Item, tested: bool) -> str:
    """The split to which an item belongs; `tested`: held-out questions come from elsewhere."""
    place = int(stable_hash(["split", item.topic])[:12], 16) / 16**12
    bounds = [0.0]
    for share in SHARES.values():
        bounds.append(bounds[-1] + share)
    split = next(split for split, (_, end) in zip(SHARES, pairwise(bounds), strict=True) if place < end)
    return DEBATE if tested and split == HELD_OUT else split


def _apart(items: Sequence[Item], held_out: Sequence[Item]) -> tuple[list[Item], int]:
    """What may be learned from: nothing that is, or shares its group with, a held-out question; the dropped."""
    marks = {mark for item in held_out for mark in item.marks}
    left = [item for item in items if not item.marks & marks]
    return left, len(items) - len(left)


def _beside(path: str | None, name: str) -> Path | None:
    """The folder with a dataset's files beside a user's own file; None where there is none: then the hub has it."""
    folder = None if path is None else Path(path).parent / (DATASETS[name].folder or name)
    return folder if folder is not None and folder.is_dir() else None


def _place(path: str | None, name: str, apart: bool = False) -> Path | None:
    """Where a dataset's files are: in a folder of its name, or else (unless it must stand `apart`) in `path` itself."""
    if path is None:
        return None
    inside = Path(path) / (DATASETS[name].folder or name)
    if apart and not inside.is_dir():
        raise UsageError(
            f"task.held_out is {name}, but {path} (task.path) has no folder {inside.name}; put the dataset's files "
            "there, or leave task.path out to load both datasets from the hub."
        )
    return inside if inside.is_dir() else Path(path)


def _check_size(name: str, split: str, wanted: int, have: int) -> None:
    if wanted > have:
        raise UsageError(
            f"questions.{split} is {wanted}, but {name} has {have} questions for it: which questions are a split's "
            f"follows from the questions themselves. Lower questions.{split} to that."
        )
