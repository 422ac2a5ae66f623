"""The datasets known by name: where they are, how their rows read, and which of their questions may be learned from.

A row is read in the columns of the hub and in the format of the authors' own files alike. What cannot be asked or
graded is left out, and counted by the reason that stands in its place.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from agentark_jax.errors import UsageError
from agentark_jax.records import stable_hash
from agentark_jax.tasks.items import Item, answered, split_gsm8k
from agentark_jax.tasks.rows import Row, read_file, read_hub

Values = Mapping[str, Any]
# The questions of a row, or why there is none.
Found = Iterable[Item | str]

UNANSWERABLE = "unanswerable"  # the gold says that there is no answer, in a format that has no words for it
AMBIGUOUS = "ambiguous"  # another choice has the same text as the right one
SEVERAL_RIGHT = "several_right"
UNLABELLED = "unlabelled"


@dataclass(frozen=True)
class Part:
    """A dataset's questions for training or for testing.

    Attributes:
        split: the hub's name of it; "+" joins several.
        files: patterns of file names, one of which stands for it in a directory; the first that matches counts.
    """

    split: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """How a dataset is found and read.

    Attributes:
        parse: the questions of one row; the seed decides about the order of choices where the rows have none.
        grader: the name of what judges answers.
        test: held-out questions; None: they are cut from `train`.
        train: None: a test set, never to be learned from; `instead` says from what.
        hub: its id there; None where no copy without code is known, and `home` says where its files are.
        configs: the hub's configurations, all of which are read.
        folder: where its files are, where another dataset has the same.
        adapt: brings all rows of a part into one convention, where a single row does not show it.
    """

    parse: Callable[[Values, int], Found]
    grader: str
    train: Part | None
    test: Part | None
    hub: str | None = None
    configs: tuple[str | None, ...] = (None,)
    revision: str | None = None
    home: str = ""
    instead: str = ""
    folder: str = ""
    adapt: Callable[[Iterable[Row]], Iterable[Row]] = iter


@dataclass(frozen=True)
class Loaded:
    """The different questions of one part of a dataset, in the order of its rows, and what was counted on the way."""

    items: list[Item]
    counts: Mapping[str, int]


# Numbers


def _gsm8k(values: Values, seed: int) -> Found:
    gold, way = split_gsm8k(values["answer"])
    yield Item(values["question"].strip(), gold, answered(way, gold))


def _svamp(values: Values, seed: int) -> Found:
    body, gold = values["Body"].strip(), _plain_number(values["Answer"])
    told = body if body.endswith((".", "?", "!")) else f"{body}."
    meta = {"equation": values["Equation"], "type": values["Type"]}
    yield Item(f"{told} {values['Question'].strip()}", gold, answered("", gold), meta=meta)


def _mawps(values: Values, seed: int) -> Found:
    gold = _plain_number(values["target"])
    yield Item(values["input"].strip(), gold, answered("", gold), meta={"type": values["type"]})


def _gsm_plus(values: Values, seed: int) -> Found:
    if values["answer"] in (None, "None"):
        yield UNANSWERABLE
        return
    _, way = split_gsm8k(values["solution"])
    meta = {"perturbation": values["perturbation_type"], "seed_answer": str(values["seed_answer"]).strip()}
    gold = values["answer"].strip()
    yield Item(values["question"].strip(), gold, answered(way, gold), group=values["seed_question"], meta=meta)


def _plain_number(value: Any) -> str:
    """145.0 and "145.0" as "145"."""
    number = Decimal(str(value))
    return format(number.quantize(Decimal(1)) if number == number.to_integral_value() else number.normalize(), "f")


# Mathematics


def _math(values: Values, seed: int) -> Found:
    gold = last_boxed(values["solution"])
    if gold is None:
        yield UNLABELLED
        return
    meta = {"level": str(values["level"]), "type": values.get("type") or values.get("subject")}
    yield _worked(values["problem"], values["solution"], gold, meta=meta)


def _math500(values: Values, seed: int) -> Found:
    meta = {"level": str(values["level"]), "type": values["subject"]}
    yield _worked(values["problem"], values["solution"], values["answer"], meta=meta)


def _metamath(values: Values, seed: int) -> Found:
    way, phrase, gold = values["response"].rpartition("The answer is:")
    if not phrase or not gold.strip():
        yield UNLABELLED
        return
    _, way = split_gsm8k(way) if "####" in way else ("", way)
    yield _worked(values["query"], way, gold, group=values["original_question"], meta={"type": values["type"]})


def _worked(problem: str, solution: str, gold: str, group: str = "", meta: Values | None = None) -> Item:
    gold = gold.strip().strip("$").strip()
    return Item(problem.strip(), gold, answered(solution, f"${gold}$"), group=group, meta=meta or {})


def last_boxed(solution: str) -> str | None:
    r"""What the last "\boxed{…}" (or "\boxed 2") of a solution holds; None where there is none."""
    _, mark, rest = solution.rpartition("\\boxed")
    if not mark:
        return None
    rest = rest.lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].split()[0].rstrip(".,") if rest.split("$")[0].strip() else None
    depth = 0
    for position, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:position].strip() or None
    return None


# Choices


def _medmcqa(values: Values, seed: int) -> Found:
    if "options" in values:
        options, right = list(values["options"].values()), ascii_uppercase.index(values["answer_idx"])
    else:
        options, right = [values[key] for key in ("opa", "opb", "opc", "opd")], int(values["cop"])
        if values["choice_type"] != "single":
            yield SEVERAL_RIGHT
            return
        if right < 0:
            yield UNLABELLED
            return
    subject = {key: values[key] for key in ("subject_name", "topic_name") if values.get(key)}
    yield _chosen(values["question"], options, right, values.get("exp") or "", subject)


def _from_zero(rows: Iterable[Row]) -> Iterator[Row]:
    """MedMCQA's own files count the right choice from 1, the hub from 0; one extreme tells which."""
    rows = list(rows)
    places = {int(row.values["cop"]) for row in rows if row.values.get("cop") is not None}
    if places and 4 not in places and not places & {0, -1}:
        raise UsageError(
            f"{rows[0].where}: the column cop has neither 0 nor 4, so that it may count choices from 0 or from 1; "
            "take the whole file."
        )
    for row in rows:
        shift = {"cop": int(row.values["cop"]) - 1} if 4 in places else {}
        yield Row(row.where, row.line, {**row.values, **shift})


def _mmlu(values: Values, seed: int) -> Found:
    options = values["choices"] if "choices" in values else [values[letter] for letter in "ABCD"]
    answer = values["answer"]
    right = ascii_uppercase.index(answer) if isinstance(answer, str) else int(answer)
    subject = values["subject"] if "subject" in values else values["type"]
    yield _chosen(values["question"], options, right, "", {"subject": subject})


def _aqua(values: Values, seed: int) -> Found:
    options = [
        option.removeprefix(letter).removeprefix(")")
        for letter, option in zip(ascii_uppercase, values["options"], strict=False)
    ]
    yield _chosen(values["question"], options, ascii_uppercase.index(values["correct"]), values["rationale"], {})


def _truthfulqa_mc(values: Values, seed: int) -> Found:
    targets = values["mc1_targets"]
    if "choices" in targets:
        targets = dict(zip(targets["choices"], targets["labels"], strict=True))
    # The right one stands first in the file.
    options = sorted(targets, key=lambda choice: stable_hash([seed, values["question"], choice]))
    (right,) = (place for place, choice in enumerate(options) if targets[choice])
    yield _chosen(values["question"], options, right, "", {})


def _chosen(question: str, options: Iterable[Any], right: int, way: str, meta: Values) -> Item | str:
    texts = tuple(str(option).strip() for option in options)
    if texts.count(texts[right]) > 1:
        return AMBIGUOUS
    letter = ascii_uppercase[right]
    return Item(question.strip(), letter, answered(way, letter), texts, meta=meta)


# Short answers, most of them about a text


def _hotpotqa(values: Values, seed: int, *, gold_only: bool = False) -> Found:
    context, facts = values["context"], values["supporting_facts"]
    if isinstance(context, Mapping):
        paragraphs = list(zip(context["title"], context["sentences"], strict=True))
        supporting = set(facts["title"])
    else:
        paragraphs, supporting = context, {title for title, _ in facts}
    told = [
        f"{title}\n{''.join(sentences).strip()}"
        for title, sentences in paragraphs
        if title in supporting or not gold_only
    ]
    meta = {"type": values["type"], "level": values["level"]}
    yield _short(values["question"], [values["answer"]], "\n\n".join(told), meta=meta)


def _qasper(values: Values, seed: int) -> Found:
    sections, asked = values["full_text"], values["qas"]
    if isinstance(sections, Mapping):
        sections = _rows_of(sections)
    if isinstance(asked, Mapping):
        asked = [{**each, "answers": _rows_of(each["answers"])} for each in _rows_of(asked)]
    told = [values["title"], values["abstract"]]
    for section in sections:
        told.append("\n".join(filter(None, [section["section_name"], *section["paragraphs"]])))
    paper = "\n\n".join(filter(None, told))
    for each in asked:
        golds = [_qasper_answer(annotation["answer"]) for annotation in each["answers"]]
        # An annotator who found an answer is believed before one who found none.
        golds.sort(key=lambda gold: gold == "Unanswerable")
        asks = f'{each["question"].strip()} If the paper does not say, answer "Unanswerable".'
        yield _short(asks, golds, paper, values["id"]) if any(golds) else UNLABELLED


def _qasper_answer(answer: Values) -> str:
    """As in QASPER's own evaluation."""
    if answer["unanswerable"]:
        return "Unanswerable"
    if answer["extractive_spans"]:
        return ", ".join(answer["extractive_spans"])
    if answer["yes_no"] is not None:
        return "Yes" if answer["yes_no"] else "No"
    return str(answer["free_form_answer"])


def _rows_of(columns: Values) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _leval(values: Values, seed: int) -> Found:
    for question, answer in zip(values["instructions"], values["outputs"], strict=True):
        yield _short(question, [answer], values["input"].strip(), stable_hash(values["input"]))


def _qmsum(values: Values, seed: int) -> Found:
    told = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in values["meeting_transcripts"])
    for kind in ("general", "specific"):
        for query in values[f"{kind}_query_list"]:
            yield _short(query["query"], [query["answer"]], told, stable_hash(told), {"type": kind})


def _truthfulqa(values: Values, seed: int) -> Found:
    values = {key.lower().replace(" ", "_"): value for key, value in values.items()}
    right, wrong = (_listed(values[f"{kind}_answers"]) for kind in ("correct", "incorrect"))
    best = values["best_answer"].strip()
    meta = {"category": values["category"], "incorrect": wrong}
    yield _short(values["question"], [best, *right], "", meta=meta)


def _listed(answers: Any) -> list[str]:
    parts = answers.split(";") if isinstance(answers, str) else answers
    return [part.strip() for part in parts if part.strip()]


def _short(question: str, golds: Iterable[str], context: str, group: str = "", meta: Values | None = None) -> Item:
    different = tuple(dict.fromkeys(gold.strip() for gold in golds if gold.strip()))
    rationale = answered("", different[0])
    return Item(question.strip(), different[0], rationale, (), different, context, group, meta=meta or {})


_TRAIN, _TEST = Part("train", ("train*",)), Part("test", ("test*",))
_HOTPOT_TRAIN = Part("train", ("hotpot_train*", "train*"))
_HOTPOT_DEV = Part("validation", ("hotpot_dev_distractor*", "dev_distractor*", "validation*"))
_MEDMCQA_DEV = Part("validation", ("dev*", "validation*"))
_HOTPOT = partial(Dataset, grader="short", hub="hotpotqa/hotpot_qa", configs=("distractor",))
_MEDMCQA = partial(Dataset, _medmcqa, "choice", hub="openlifescienceai/medmcqa", adapt=_from_zero)

DATASETS: Mapping[str, Dataset] = {
    "gsm8k": Dataset(_gsm8k, "numeric", _TRAIN, _TEST, "openai/gsm8k", ("main",)),
    "math": Dataset(
        _math, "symbolic", _TRAIN, _TEST, "EleutherAI/hendrycks_math",
        ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
         "precalculus"),
    ),
    "metamathqa": Dataset(
        _metamath, "symbolic", Part("train", ("MetaMathQA*", "train*")), None, "meta-math/MetaMathQA",
    ),
    "medmcqa": _MEDMCQA(_TRAIN, _MEDMCQA_DEV),
    "medmcqa_dev": _MEDMCQA(_MEDMCQA_DEV, None, folder="medmcqa"),
    "aqua": Dataset(_aqua, "choice", _TRAIN, _TEST, "deepmind/aqua_rat", ("raw",)),
    "mmlu": Dataset(_mmlu, "choice", Part("validation", ("val*",)), _TEST, "cais/mmlu", ("all",)),
    "hotpotqa": _HOTPOT(_hotpotqa, train=_HOTPOT_TRAIN, test=_HOTPOT_DEV),
    "hotpotqa_gold": _HOTPOT(
        partial(_hotpotqa, gold_only=True), train=_HOTPOT_TRAIN, test=_HOTPOT_DEV, folder="hotpotqa"
    ),
    "qasper": Dataset(
        _qasper, "short", Part("train", ("qasper-train*", "train*")), Part("test", ("qasper-test*", "test*")),
        "allenai/qasper", revision="refs/convert/parquet",
    ),
    "qmsum": Dataset(_qmsum, "short", _TRAIN, _TEST, home="data/ALL/jsonl of github.com/Yale-LILY/QMSum"),
    "math500": Dataset(_math500, "symbolic", None, _TEST, "HuggingFaceH4/MATH-500", instead="math"),
    "svamp": Dataset(_svamp, "numeric", None, Part("train+test", ("test*",)), "ChilleD/SVAMP", instead="gsm8k"),
    "mawps": Dataset(
        _mawps, "numeric", None, _TEST, home="data/mawps of github.com/ZubinGou/math-evaluation-harness",
        instead="gsm8k",
    ),
    "gsm_plus": Dataset(
        _gsm_plus, "numeric", None, Part("testmini", ("testmini*",)), "qintongli/GSM-Plus", instead="gsm8k",
    ),
    "mmlu_stem": Dataset(
        _mmlu, "choice", None, _TEST, home="data/mmlu_stem of github.com/ZubinGou/math-evaluation-harness",
        instead="mmlu",
    ),
    "qasper_leval": Dataset(
        _leval, "short", None, Part("test", ("leval_scientific_qa*", "scientific_qa*")),
        home="LEval-data/Open-ended-tasks of github.com/OpenLMLab/LEval", instead="qasper", folder="qasper",
    ),
    "truthfulqa": Dataset(
        _truthfulqa, "short", None, Part("validation", ("TruthfulQA*",)), "truthfulqa/truthful_qa", ("generation",),
        instead="hotpotqa",
    ),
    "truthfulqa_mc": Dataset(
        _truthfulqa_mc, "choice", None, Part("validation", ("mc_task*",)), "truthfulqa/truthful_qa",
        ("multiple_choice",), instead="mmlu", folder="truthfulqa",
    ),
}  # fmt: skip


def load(name: str, part: Part, path: Path | None, seed: int, key: str = "task.path") -> Loaded:
    """The questions of one part of a dataset, from the file or directory `path`, or else from the hub.

    Of equal questions the first stays. Short answers to it are collected; where others differ, none of them stays.
    `key` is what named the path: messages tell it.

    Raises:
        UsageError: no such file or dataset, or a row that is not as the dataset's rows are.
    """
    counts = {"read": 0}
    first: dict[str, Item] = {}
    at_odds: set[str] = set()
    for row in read_rows(name, part, path, key):
        for found in _parsed(name, row, seed):
            counts["read"] += 1
            if isinstance(found, str):
                _count(counts, found)
            elif found.key not in first:
                first[found.key] = found
            else:
                _count(counts, "duplicates")
                earlier = first[found.key]
                golds = dict.fromkeys([*earlier.answers, *found.answers])
                first[found.key] = replace(earlier, answers=tuple(golds))
                if not golds and earlier.answer != found.answer:
                    at_odds.add(found.key)
    for key in sorted(at_odds):
        del first[key]
        _count(counts, "answered_differently")
    return Loaded(list(first.values()), counts)


def _count(counts: dict[str, int], reason: str) -> None:
    counts[f"{reason}_dropped"] = counts.get(f"{reason}_dropped", 0) + 1


def _parsed(name: str, row: Row, seed: int) -> Iterator[Item | str]:
    try:
        found = list(DATASETS[name].parse(row.values, seed))
        for item in found:
            if isinstance(item, Item):
                if not (item.question and item.answer):
                    raise ValueError("an empty question or answer")
                "".join([item.context, item.text, item.rationale, *item.answers]).encode()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"no column {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"{row.where}: not as the rows of {name} are ({what}); it has: {', '.join(row.values)}. Give the dataset's "
            "own files, or describe these with task.fields and leave task.name out."
        ) from error
    for item in found:
        yield item if isinstance(item, str) else replace(item, line=row.line)


def read_rows(name: str, part: Part, path: Path | None, key: str = "task.path") -> Iterable[Row]:
    """The rows of one part of a dataset as they are published. Raises UsageError where they cannot be had."""
    dataset = DATASETS[name]
    return dataset.adapt(_read(name, dataset, part, path, key))


def _read(name: str, dataset: Dataset, part: Part, path: Path | None, key: str) -> Iterator[Row]:
    if path is not None:
        for file in [path] if not path.is_dir() else _files(name, part, path, key):
            yield from read_file(file, key)
    elif dataset.hub is None:
        raise UsageError(
            f"task.name: {name} is not on the hub without code; give a directory with its files (from {dataset.home}) "
            f"as {key}."
        )
    else:
        for config in dataset.configs:
            yield from read_hub(dataset.hub, config, part.split, dataset.revision)


def _files(name: str, part: Part, directory: Path, key: str) -> list[Path]:
    for pattern in part.files:
        found = sorted(path for path in directory.glob(pattern) if _is_data(path))
        if found:
            return found
    raise UsageError(
        f"{key}: {directory} has no file {' or '.join(part.files)} (.jsonl, .json or .parquet) for {name}. Put it "
        + (
            "there, give the training file alone (held-out questions are then cut from it), or leave task.path out to "
            "load the dataset from the hub."
            if key == "task.path"
            else "there, or give the file itself."
        )
    )


def _is_data(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".jsonl", ".json", ".parquet"))


def stands_for(part: Part, path: Path) -> bool:
    """Whether a file has the name of a part's files."""
    return any(path.match(pattern) for pattern in part.files)
