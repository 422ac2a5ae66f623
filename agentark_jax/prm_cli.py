"""`agentark prm`: process reward models of published labels, what they say of solutions, and how far sources of step
labels agree.
"""

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentark_jax.data.first_errors import (
    READERS,
    LineLabels,
    OtherText,
    Solution,
    check_solution,
    drawn,
    line_labels,
    read_solutions,
)
from agentark_jax.errors import UsageError
from agentark_jax.evaluation.first_error_baselines import Found, Judged, compare
from agentark_jax.evaluation.statistics import MeanInterval, sentence, wilson_interval
from agentark_jax.evaluation.steps import FirstErrors, LabelQuality, first_error, label_quality
from agentark_jax.files import atomic_path, write_json
from agentark_jax.progress import Display
from agentark_jax.report import words
from agentark_jax.stages import Work, git_revision, locked, package_versions, read_manifest
from agentark_jax.tasks.grading import GRADERS, grader
from agentark_jax.tasks.rows import read_file
from agentark_jax.tools import Parser
from agentark_jax.traces.labels import labelled_turns
from agentark_jax.traces.store import TraceStore
from agentark_jax.traces_cli import count_of, graded_by, make_console, of_debate, plain, store_file

_PRM = """\
Process reward models: models that say of each step of a solution how probably it is right.

  agentark prm fit --model Qwen/Qwen3-0.6B --dataset prm800k --data phase2_train.jsonl --out prm
  agentark prm score --model runs/lab/prm/whole/model --data solutions.jsonl --out scored.jsonl
  agentark prm score --model DIR --data mr_ben/math.jsonl.gz --dataset mr_ben
  agentark prm labels runs/lab --grader final_answer
"""
_FIT = f"""\
Train a process reward model from published labels of steps, without a debate.

--data names one or more FILEs (with commas between them) of --dataset, as published:
{", ".join(READERS)}
(the last adds to prmbench the right solutions that its errors were planted in). Without --dataset they have JSON lines
of yours {{"question", "steps": [texts]}} with "first_error" (a number from 0, or null if all are right) or "right" (of
each step how probably it is right, from 0 to 1).

The model is --model with a head that says at the last token of each step how probably it is right. It is trained as in
a run: first its last layer and the head (--prm.frozen.*), then everything (--prm.whole.*; --prm.whole null: not). The
loss is the cross-entropy of each step; --prm.wrong_weight says how much a wrong one counts. Steps that the labels tell
nothing of are not trained on; solutions longer than a row (--prm.frozen.row_length) are left out; both are counted.

The solutions to --held_out of the questions, by a hash, are not learned from. The command ends with what
`agentark prm score` says of them. OUT is then a model directory for that command, with the settings in fit.json and the
figures in results.json; its card, prm.json, knows which questions it has learned. A command that was killed goes on
where it was; one with other settings refuses OUT.

  agentark prm fit --model gguf:gemma3-270m --dataset prmbench_pairs --data prmbench/test.jsonl.gz --out prm \\
    --prm.wrong_weight 1.5 --prm.frozen.last_layers 4 --prm.whole null
  agentark prm fit --model Qwen/Qwen3-0.6B --dataset math_shepherd --data math-shepherd.jsonl --out prm --seed 1
  agentark prm score --model prm --dataset mr_gsm8k --data MR-GSM8K.json
"""
_SCORE = f"""\
Say of each step of each solution how probably it is right, and which is the first step below the threshold.

FILE has JSON lines (.gz, .json, .parquet too) {{"question", "steps": [texts]}} or {{"question", "solution"}}; or, with
--dataset, is a file of it as published: {", ".join(READERS)}.
Steps are then cut as in training, so that one of yours may be several, or a part of one. OUT gets a line a solution:
"steps", their probabilities "right", "first_error" (from 0, null for none), and where it is marked in which of your
steps that is, "line", and where the first error truly is, "true_line". Solutions longer than the model takes are
"skipped", as are marked ones that the tokenizer changes, such as combining accents.

Where first errors are marked (by the dataset, or by "first_error" beside "steps": a number from 0, or null if all are
right) it prints, with Wilson's 95 % intervals, clustered by question: of wrong solutions the share whose first error is
located exactly (MR-GSM8K's accuracy), of right ones the share that is cleared, their harmonic mean (F1, ProcessBench's,
with an interval from resampled questions: the bootstrap) and how honest the probabilities are (Brier score, expected
calibration error). Two baselines that read nothing stand
beside it: `majority` always tells the most frequent first error, `length-only` sees how long steps are and where they
stand. Both were fitted on the other half of the questions, to the same labels; a model that does not beat them has not
learned to judge steps. `the model, threshold fitted` is the model with a threshold that was found in the same way.
Solutions to questions that `agentark prm fit` taught the model are "learned": OUT has them, these figures have not.

  agentark prm score --model DIR --data solutions.jsonl --out scored.jsonl
  agentark prm score --model DIR --data prmbench/test.jsonl.gz --dataset prmbench --threshold 0.7
"""
_LABELS = """\
Compare labels of the steps of a run's debate: how often sources find the same first error, and what they cost.

`consensus` and `debate` follow from the debate itself, `outcome` from whether an answer is right; they cost nothing
more. With --speaker, a model continues each
step several times; with --judge, one is asked of each step; with both, `agreed` is what they tell alike. What they said
is kept below OUT, so that the same command repeats nothing; files that stages of the run made are found and shown, too,
as are those of --labels. On the built-in word problems, where each step's truth is known, precision and recall of wrong
steps, and first errors, are told as well. Intervals are Wilson's at 95 %, clustered by question; the F1's is from
resampled questions (bootstrap).

  agentark prm labels runs/lab --grader final_answer
  agentark prm labels runs/lab --grader final_answer --speaker runs/lab/model --judge Qwen/Qwen3-0.6B --questions 50
"""
OWN, FITTED = "own", "the model, threshold fitted"
_OTHER_TEXT = "tokens do not say the text, which the tokenizer changes"
_MODEL = "a directory in Hugging Face format, or a hub id"


def prm(arguments: Sequence[str]) -> int:
    """`agentark prm`; the exit code. Raises UsageError for arguments that cannot be used."""
    if arguments[:1] == ["fit"]:  # which has one option per key of its settings
        return _fit(arguments[1:])
    parser = Parser("agentark prm", _PRM)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    commands.add_parser("fit", help="a model of published labels, without a debate", description=_FIT)

    score = commands.add_parser("score", help="probabilities of steps, and first errors", description=_SCORE)
    score.add_argument("--model", required=True, type=Path, metavar="DIR", help="a trained process reward model")
    score.add_argument("--data", required=True, type=Path, metavar="FILE", help="solutions")
    score.add_argument("--dataset", choices=READERS, help="whose format FILE has")
    score.add_argument("--out", type=Path, metavar="OUT", help="where to write a line for each solution")
    score.add_argument("--results", type=Path, metavar="FILE", help="where to write the figures, as JSON")
    score.add_argument(
        "--limit", type=count_of, metavar="N", help="score so many, questions drawn by hash (default: all)"
    )
    score.add_argument(
        "--threshold", type=_share, default=0.5, metavar="P", help="a step is wrong below it (default: %(default)s)"
    )
    score.add_argument(
        "--batch_tokens", type=count_of, default=8192, metavar="N", help="scored at once (default: %(default)s)"
    )
    score.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default: %(default)s)")
    score.set_defaults(run=_score)

    labels = commands.add_parser("labels", help="how far sources of step labels agree", description=_LABELS)
    labels.add_argument("store", metavar="RUN_DIR", type=store_file, help="a run's directory, or a store's file")
    labels.add_argument("--grader", required=True, metavar="GRADER", help="whose labels of answers count: see `traces`")
    labels.add_argument("--tokenizer", type=Path, metavar="DIR", help="of the debaters (default: the run's model)")
    labels.add_argument("--labels", type=Path, action="append", default=[], metavar="FILE", help="more labels of steps")
    labels.add_argument("--speaker", metavar="MODEL", help=f"continues steps: {_MODEL}")
    labels.add_argument("--judge", metavar="MODEL", help=f"is asked of steps: {_MODEL}")
    labels.add_argument("--servers", nargs="+", default=[], metavar="URL", help="SGLang servers that have the speaker")
    labels.add_argument("--judge-servers", nargs="+", default=[], metavar="URL", help="SGLang servers with the judge")
    labels.add_argument("--continuations", type=count_of, default=4, metavar="N", help="of a step (default: 4)")
    labels.add_argument("--max-tokens", type=count_of, default=256, metavar="N", help="of each (default: 256)")
    labels.add_argument("--questions", type=count_of, metavar="N", help="whose answers are asked about (default: all)")
    labels.add_argument("--turns", type=count_of, metavar="N", help="answers to each (default: all)")
    labels.add_argument("--seed", type=count_of, default=0, metavar="N", help="of continuations (default: 0)")
    labels.add_argument("--out", type=Path, metavar="OUT", help="(default: step_labels in the run's directory)")
    labels.set_defaults(run=_labels)

    options = parser.parse_args(arguments)
    code: int = options.run(options)
    return code


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{text!r} is no probability")
    return value


# Scoring


@dataclass(frozen=True)
class _Row:
    """A solution of a file; `marked`: its first error is known."""

    solution: Solution
    marked: bool


def _read(path: Path, dataset: str | None) -> list[_Row]:
    if dataset is not None:
        return [_Row(solution, solution.whole) for solution in read_solutions(dataset, path)]
    rows = []
    for row in read_file(path, "--data"):
        values = row.values
        question, lines, error = values.get("question"), values.get("steps"), values.get("first_error")
        if lines is None and isinstance(values.get("solution"), str):
            lines = [values["solution"]]
            for key in ("first_error", "right"):
                if key in values:
                    raise UsageError(f'{row.where}: {key} counts steps: give "steps", a list, instead of "solution".')
        if not isinstance(question, str) or not isinstance(lines, list) or not all(isinstance(x, str) for x in lines):
            raise UsageError(f'{row.where}: write {{"question": …, "steps": [texts]}} or {{"question", "solution"}}.')
        if error is not None and (type(error) is not int or not 0 <= error < len(lines)):
            raise UsageError(
                f"{row.where}: first_error is {error!r}; it is a number of {len(lines)} steps, from 0, or null."
            )
        right = values.get("right")
        if right is not None:
            if "first_error" in values:
                raise UsageError(f"{row.where}: has both first_error and right; remove one of them.")
            if not isinstance(right, list) or len(right) != len(lines) or not all(map(_is_share, right)):
                raise UsageError(f"{row.where}: right is {right!r}; it is a list of {len(lines)} numbers from 0 to 1.")
            right = tuple(map(float, right))
            error = first_error(right)
        marked = right is not None or "first_error" in values
        solution = Solution(question, tuple(lines), error, OWN, right)
        check_solution(solution, row.where)
        rows.append(_Row(solution, marked))
    return rows


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, Decimal, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _score(options: Namespace) -> int:
    rows = _read(options.data, options.dataset)
    for key in ("batch_tokens", "limit"):
        if getattr(options, key) == 0:
            raise UsageError(f"--{key} is 0: give a positive number.")

    from agentark_jax.cache import enable_compilation_cache
    from agentark_jax.prm_fit import is_learned
    from agentark_jax.training.config import MeshConfig
    from agentark_jax.training.mesh import make_mesh
    from agentark_jax.training.prm import load_prm

    enable_compilation_cache()
    mesh = make_mesh(MeshConfig())
    model = load_prm(options.model, mesh, options.dtype)
    fresh = [row for row in rows if not is_learned(row.solution, model.card.published)]
    learned, marked = len(rows) - len(fresh), any(row.marked for row in rows)
    if options.limit is not None:
        rows = [fresh[index] for index in drawn([row.solution for row in fresh], options.limit, 0, whole=False)]
    settings: dict[str, Any] = {"tokens": options.batch_tokens, "dtype": options.dtype}
    lines, judged = _judge(model, rows, mesh, options.threshold, **settings)
    if options.out is not None:
        with atomic_path(options.out) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in lines)
    skipped = sum("skipped" in each for each in lines)
    print(
        f"{options.data}: {len(rows) - skipped:,} solutions scored, {_skipped(lines)}"
        + ("" if options.out is None else f"; see {options.out}")
    )
    if learned and marked:
        print(f"{learned:,} are to questions that the model was trained on: the figures leave them out")
    found = _tell(judged, options.threshold) if judged else {}
    if not marked and options.out is None:
        for each in lines:
            print(json.dumps(each, ensure_ascii=False))
    if options.results is not None:
        about = {"dataset": options.dataset or OWN, "file": _named(options.data), "limit": options.limit}
        counts = {"scored": len(rows) - skipped, "skipped": skipped, "learned": learned}
        write_json(options.results, {**about, "prm": model.card.made_from, **counts, **found, **_versions()})
    return 0


def _judge(
    model: Any, rows: Sequence[_Row], mesh: Any, threshold: float, **settings: Any
) -> tuple[list[dict[str, Any]], list[Judged]]:
    """What a model says of each solution, and of those that are marked and that it has not learned, what is true."""
    from agentark_jax.data.steps import steps
    from agentark_jax.prm_fit import is_learned
    from agentark_jax.training.scoring import score_steps

    display = Display(Console(stderr=True))
    found, sequences = {}, {}
    labelled: dict[int, LineLabels | None] = {}
    skipped: dict[int, str] = {}
    with display.bar("cut steps", total=len(rows)) as bar:
        for index, row in enumerate(rows):
            bar.more(1)
            prompt = [token for segment in model.form.question(row.solution.asked) for token in segment]
            ids = list(model.form.response(row.solution.text))
            if len(prompt) + len(ids) > model.config.max_positions:
                skipped[index] = f"longer than the {model.config.max_positions} tokens that the model takes"
                continue
            found[index] = steps(ids, model.form.tokenizer)
            try:
                labelled[index] = line_labels(row.solution, found[index]) if row.marked else None
            except OtherText as told_otherwise:
                skipped[index] = f"{_OTHER_TEXT}: {told_otherwise}"
                continue
            sequences[index] = ([*prompt, *ids], [len(prompt) + step.end - 1 for step in found[index]])
    with display.bar("score solutions", total=len(sequences)) as bar:
        given = list(sequences.values())
        scores = score_steps(model.config, model.params, model.head, given, mesh, progress=bar.more, **settings)
    right = dict(zip(sequences, scores, strict=True))

    judged: list[Judged] = []
    lines: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        told: dict[str, Any] = {"question": row.solution.question}
        lines.append(told)
        if index in skipped:
            told["skipped"] = skipped[index]
            continue
        error = first_error(right[index].tolist(), threshold)
        told |= {
            "steps": [step.text for step in found[index]],
            "right": [round(float(each), 6) for each in right[index]],
            "first_error": error,
        }
        learned = is_learned(row.solution, model.card.published)
        if learned:
            told["learned"] = True
        labels = labelled[index]
        if labels is not None:
            told["line"] = None if error is None else int(labels.lines[error])
            told["true_line"] = row.solution.first_error
            lengths = np.asarray([step.end - step.start for step in found[index]])
            marked = Judged(row.solution.question, right[index], lengths, *labels, error=row.solution.first_error)
            if not learned:
                judged.append(marked)
    return lines, judged


def _skipped(lines: Sequence[Mapping[str, Any]]) -> str:
    """How many solutions were skipped, and why."""
    why = [each["skipped"] for each in lines if "skipped" in each]
    other = sum(each.startswith(_OTHER_TEXT) for each in why)
    more = f", {other:,} because their tokens do not say their text" if other else ""
    return f"{len(why) - other:,} skipped as too long for the model{more}"


def _tell(judged: Sequence[Judged], threshold: float) -> dict[str, Any]:
    """Prints how well first errors are found; the same as JSON values."""
    name = "the model"
    compared = compare(judged, threshold, name=name)
    if len(compared) > 1:
        fitted = compare(judged, None, name=FITTED)
        compared = {name: compared.pop(name), FITTED: fitted[FITTED], **compared}
    questions = len({each.question for each in judged})
    title = f"{len(judged):,} marked solutions to {questions:,} questions, threshold {threshold:g}"
    table = Table(title=plain(title), title_justify="left")
    for head in ("", "F1", "errors located", "right ones cleared", "Brier", "ECE", "steps"):
        table.add_column(head, justify="left" if head == "" else "right")
    for who, found in compared.items():
        table.add_row(who, *_cells(found))
    console = make_console()
    console.print(table)
    if len(compared) == 1:
        console.print("no baselines: they need solutions to some more questions, to be fitted on the half of them")
        return {"questions": questions, "threshold": threshold, "first_errors": _figures(compared)}
    over = {who: {name: compared[who].model_over, FITTED: fitted[who].model_over} for who in fitted if who != FITTED}
    gained = {who: {name: compared[who].f1_over, FITTED: fitted[who].f1_over} for who in over}
    for who, each in over.items():
        for model, difference in each.items():
            if difference is not None:
                console.print(Text(sentence(f"first errors told exactly, {model} over {who}", difference)))
    for who, of_f1 in gained.items():
        for model, gain in of_f1.items():
            if gain is not None:
                interval = words.interval(gain.low, gain.high, signed=True) or "not known"
                text = f"F1, {model} over {who}: {words.points(gain.difference)} points, 95 % interval {interval}"
                console.print(Text(text))
    return {
        "questions": questions,
        "threshold": threshold,
        "first_errors": _figures(compared),
        "model_over": _differences(over),
        "f1_over": _differences(gained),
    }


def _differences(over: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By whom the models are compared with, and by model."""
    return {who: {model: each and asdict(each) for model, each in found.items()} for who, found in over.items()}


def _figures(compared: Mapping[str, Found]) -> dict[str, Any]:
    return {
        who: {"f1": found.errors.f1, **asdict(found.errors), "calibration": asdict(found.calibration)}
        for who, found in compared.items()
    }


def _cells(found: Found) -> Iterator[str]:
    yield _f1(found.errors)
    yield _interval(found.errors.located)
    yield _interval(found.errors.cleared)
    yield f"{found.calibration.brier:.3f}"
    yield f"{found.calibration.expected_error:.3f}"
    yield f"{found.calibration.n:,}"


def _f1(errors: FirstErrors) -> str:
    if errors.f1 is None:
        return "–"
    interval = errors.f1_interval
    return f"{100 * errors.f1:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def _interval(share: MeanInterval | None) -> str:
    if share is None:
        return "–"
    return f"{100 * share.mean:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}], n {share.n:,}"


def _named(path: Path) -> dict[str, str]:
    from agentark_jax.models.weights import file_sha256

    return {"name": path.name, "sha256": file_sha256(path)}


def _versions() -> dict[str, Any]:
    return {"git": git_revision(), "versions": package_versions()}


# Fitting


def _fit(arguments: Sequence[str]) -> int:
    from agentark_jax import config

    options: dict[str, dict[str, Any]] = {
        "model": {"type": str, "help": f"what to train: {_MODEL}, or gguf:gemma3-270m"},
        "dataset": {"type": str, "help": f"whose format the files have: {', '.join(READERS)} (default: yours)"},
        "data": {"type": str, "metavar": "FILE", "help": "solutions with labels; several with commas between them"},
        "out": {"type": str, "help": "directory for the model; what was begun there is gone on with"},
        "held_out": {"type": float, "default": 0.1, "help": "share of the questions that is not learned from"},
        "limit": {"type": int, "help": "learn from so many solutions, whole questions drawn by hash (default: all)"},
        "score": {"type": int, "help": "judge so many held-out solutions, drawn by hash (default: all)"},
        "seed": {"type": int, "default": 0, "help": "of the division, the drawing and the training"},
        "batch_tokens": {"type": int, "default": 8192, "help": "held-out tokens that are scored at once"},
    }
    settings, given = config.parse_prm(arguments, "agentark prm fit", _FIT, options)
    for key in ("model", "data", "out"):
        if given[key] is None:
            raise UsageError(f"--{key} is missing. `agentark prm fit --help` lists the options.")
    if given.dataset is not None and given.dataset not in READERS:
        raise UsageError(f"--dataset {given.dataset!r}: give one of {', '.join(READERS)}, or none for rows of yours.")
    if not 0 <= given.held_out < 1:
        raise UsageError(f"--held_out is {given.held_out}: give a share of the questions, at least 0 and below 1.")
    for key, least in (("limit", 1), ("score", 1), ("seed", 0), ("batch_tokens", 1)):
        if given[key] is not None and given[key] < least:
            raise UsageError(f"--{key} is {given[key]}: give a number from {least} on.")
    files = tuple(Path(name) for name in given.data.split(",") if name)
    rows = [row for path in files for row in _read(path, given.dataset)]
    unmarked = sum(not row.marked and row.solution.values is None for row in rows)
    if unmarked:
        raise UsageError(
            f'--data {given.data}: {unmarked:,} of {len(rows):,} solutions have no labels; give "first_error" or '
            '"right" beside "steps", or remove the rows.'
        )

    from agentark_jax.cache import enable_compilation_cache
    from agentark_jax.prm_fit import RESULTS, Published, divide, fit_published
    from agentark_jax.training.config import MeshConfig
    from agentark_jax.training.mesh import make_mesh
    from agentark_jax.training.prm import load_prm

    enable_compilation_cache()
    data = Published(given.dataset or OWN, files, given.held_out, given.limit, given.seed)
    learned, kept = divide([row.solution for row in rows], data)
    out, display = Path(given.out), Display(Console(stderr=True))
    with locked(out, ("--out", "--out")):
        counts = fit_published(out, settings, _model(given.model, settings.prompt), data, learned, display)
        steps = counts["examples"]
        print(
            f"{out}: trained on {steps['answers']:,} of {len(rows):,} solutions, {counts['too_long']:,} more were too "
            f"long; {steps['right']:,} right and {steps['wrong']:,} wrong steps, {counts['unknown_steps']:,} more are "
            "not known"
        )
        if counts.get("other_text"):
            print(f"{counts['other_text']:,} more were left out because {_OTHER_TEXT}")
        if steps["wrong"]:
            print(
                f"wrong steps count as much as right ones with prm.wrong_weight {steps['right'] / steps['wrong']:.3g}"
            )
        told: dict[str, Any] = {"held_out": len(kept), "scored": 0}
        if kept:
            mesh = make_mesh(MeshConfig())
            model = load_prm(out, mesh)
            asked = [
                _Row(kept[index], kept[index].whole) for index in drawn(kept, given.score, given.seed, whole=False)
            ]
            lines, judged = _judge(model, asked, mesh, 0.5, tokens=given.batch_tokens)
            skipped = sum("skipped" in each for each in lines)
            print(f"{len(kept):,} solutions were held out; {len(judged):,} scored, {_skipped(lines)}")
            told |= {"scored": len(judged), "skipped": skipped, **(_tell(judged, 0.5) if judged else {})}
        else:
            print("no question was held out: score the model on other data, with `agentark prm score`")
        write_json(out / RESULTS, {"trained": counts, "score": given.score, **told, **_versions()})
    return 0


# Labels


def _labels(options: Namespace) -> int:
    from agentark_jax.process import LABELS, answers_of
    from agentark_jax.tasks.word_problems import NAME, exact_step_truth
    from agentark_jax.traces.step_labels import (
        StepLabels,
        agreed,
        by_consensus,
        by_debate,
        by_outcome,
        load_step_labels,
    )

    tokenizer = _tokenizer(options)
    sources: dict[str, list[StepLabels]] = {}
    with TraceStore(options.store, read_only=True) as store:
        judge = graded_by(store, options.grader)
        rows = labelled_turns(store, judge, keys=of_debate(options.store))
        answers, counts = answers_of(store, [row.key for row in rows], [tokenizer])
        questions = {question.id: question for question in store.questions()}
        rows = [row for row in rows if row.key in answers]
        if not rows:
            raise UsageError(
                f"{options.store}: none of {counts['other_tokenizer']} turns was made with the tokenizer of "
                "--tokenizer; give the directory of the model that debated."
            )
        texts = {key: answer.texts for key, answer in answers.items()}
        sources["consensus"] = by_consensus(rows, texts)
        sources["debate"] = by_debate(rows, texts, {key: answer.parents for key, answer in answers.items()})
        sources["outcome"] = by_outcome(rows, texts)
        bought = _bought(options, store, rows)
    sources |= bought
    if len(bought) == 2:
        sources["agreed"] = agreed(*bought.values())
    # Those of a stage are beside the trace store, and those that this command made below a folder there.
    made = sorted(options.store.parent.glob(f"*/{LABELS}"))
    asked = {row.key: row.question_id for row in rows}
    kept = {str(path.relative_to(options.store.parent)): load_step_labels(path) for path in made}
    # Not those of a control's turns: what is compared are labels of the debate.
    sources |= {name: labels for name, labels in kept.items() if any(each.key in asked for each in labels)}
    sources |= {str(path): load_step_labels(path) for path in options.labels}
    for name, labels in sources.items():
        for each in labels:
            if each.key not in asked:
                raise UsageError(f"{name}: has labels of turn {each.key}, which is none of {options.store}.")
            if len(each.right) != len(texts[each.key]):
                raise UsageError(
                    f"{name}: turn {each.key} has {len(texts[each.key])} steps but {len(each.right)} labels: they were "
                    "made with other rules. Make them anew."
                )

    truth = {}
    for key, question in asked.items():
        if questions[question].task == NAME:
            found = exact_step_truth(questions[question], texts[key])
            if found is not None:
                truth[key] = found
    console = make_console()
    console.print(_costs(options, sources, asked))
    if len(sources) > 1:
        console.print(_agreements(sources, asked))
    if truth:
        console.print(_qualities(sources, truth, asked))
    if counts["other_tokenizer"]:
        console.print(f"{counts['other_tokenizer']:,} turns of another tokenizer were left out")
    return 0


def _tokenizer(options: Namespace) -> Any:
    """That of the debaters."""
    from agentark_jax.cast import model_directory
    from agentark_jax.data.tokenizer import Tokenizer

    if options.tokenizer is not None:
        return Tokenizer(options.tokenizer)
    made = read_manifest(options.store.parent / "raw_model")
    if made is None:
        raise UsageError(
            f"--tokenizer is missing: {options.store.parent} is no directory of a run, which would have a model. Give "
            "the directory of the model that debated."
        )
    return Tokenizer(model_directory(made))


def _bought(options: Namespace, store: TraceStore, rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Labels that models are asked for."""
    if options.speaker is None and options.judge is None:
        return {}
    if options.grader not in GRADERS:
        raise UsageError(f"--grader {options.grader!r}: a model's answers need a rule, one of {', '.join(GRADERS)}.")
    if options.continuations < 1 or options.max_tokens < 1:
        raise UsageError("--continuations and --max-tokens must be at least 1.")

    from agentark_jax.cache import enable_compilation_cache
    from agentark_jax.engines.config import EngineConfig, check_servers
    from agentark_jax.generation import Generation
    from agentark_jax.process import label_steps
    from agentark_jax.protocols.calls import Draw
    from agentark_jax.training.prm_config import LabelSource, PRMConfig

    check_servers("--servers", options.servers)
    check_servers("--judge-servers", options.judge_servers)
    enable_compilation_cache()
    display = Display(Console(stderr=True))
    config = PRMConfig(
        coefficients={"cross_entropy": 1.0},
        continuations=options.continuations,
        questions=options.questions,
        turns=options.turns,
    )
    out = options.out or options.store.parent / "step_labels"
    found: dict[str, list[Any]] = {}
    wanted: list[tuple[LabelSource, str | None, list[str]]] = [
        ("continuations", options.speaker, options.servers),
        ("judge", options.judge, options.judge_servers),
    ]
    for source, model, servers in wanted:
        if model is None:
            continue
        generation = Generation(EngineConfig(slots=16, prompt_bucket=64), store, display, seed=options.seed)
        seat = _seat(model, servers)
        work = Work(out / source)
        work.directory.mkdir(parents=True, exist_ok=True)
        found[source] = label_steps(
            work,
            replace(config, labels=source),
            rows,
            store,
            grade=grader(options.grader),
            draw=Draw(1.0, options.max_tokens),
            seed=options.seed,
            generation=generation,
            display=display,
            tokenizers=[_tokenizer(options)],
            speaker=seat,
            judge=seat,
        )
        generation.release()
    return found


def _seat(name: str, servers: Sequence[str]) -> Any:
    """A model by itself, as it is asked by default."""
    from agentark_jax.data.config import PromptConfig
    from agentark_jax.generation import Seat

    return Seat(_model(name, PromptConfig()), tuple(servers))


def _model(name: str, prompt: Any) -> Any:
    """A model by itself, asked as `prompt` says."""
    from agentark_jax.data.chat import make_format
    from agentark_jax.generation import Model
    from agentark_jax.models.config import load_config
    from agentark_jax.models.gguf import resolve_model
    from agentark_jax.models.weights import weights_fingerprint

    directory = resolve_model(name)
    config = load_config(directory)
    form = make_format(directory, prompt, embeddings=config.vocab_size)
    called = directory.name if Path(name).exists() else name
    return Model(called, directory, weights_fingerprint(directory), config, form)


def _costs(options: Namespace, sources: Mapping[str, Sequence[Any]], asked: Mapping[str, str]) -> Table:
    table = Table(title=f"{plain(str(options.store))}: {len(asked):,} turns", title_justify="left")
    for head in ("source", "turns labelled", "steps", "thereof wrong", "answers with an error", "tokens", "a turn"):
        table.add_column(head, justify="left" if head == "source" else "right", overflow="fold")
    for name, labels in sources.items():
        steps = [right for each in labels for right in each.right]
        tokens, wrong = sum(each.tokens for each in labels), sum(each.first_error is not None for each in labels)
        counts = (len(labels), len(steps), sum(right < 0.5 for right in steps), wrong, tokens)
        each = f"{tokens / len(labels):,.0f}" if labels else "–"
        table.add_row(Text(plain(name)), *(f"{count:,}" for count in counts), each)
    return table


def _agreements(sources: Mapping[str, Sequence[Any]], asked: Mapping[str, str]) -> Table:
    table = Table(title="the same first error, or none, of turns that both label", title_justify="left")
    for head in ("source", "and", "agree", "where one tells an error"):
        table.add_column(head, justify="left" if head in ("source", "and") else "right", overflow="fold")
    errors = {name: {each.key: each.first_error for each in labels} for name, labels in sources.items()}
    for (one, first), (other, second) in combinations(errors.items(), 2):
        both = sorted(first.keys() & second.keys())
        hard = [key for key in both if (first[key], second[key]) != (None, None)]
        shares = []
        for keys in (both, hard):
            same = np.asarray([first[key] == second[key] for key in keys], bool)
            clusters = np.asarray([asked[key] for key in keys])
            share = MeanInterval(float(same.mean()), *wilson_interval(same, clusters), n=len(keys)) if keys else None
            shares.append(_interval(share))
        table.add_row(Text(plain(one)), Text(plain(other)), *shares)
    return table


def _qualities(
    sources: Mapping[str, Sequence[Any]], truth: Mapping[str, tuple[bool, ...]], asked: Mapping[str, str]
) -> Table:
    table = Table(title=f"against the truth of {len(truth):,} turns", title_justify="left")
    for head in ("source", "labelled", "precision", "recall", "errors located", "right ones cleared", "F1", "tokens"):
        table.add_column(head, justify="left" if head == "source" else "right", overflow="fold")
    for name, labels in sources.items():
        quality: LabelQuality = label_quality(labels, truth, {key: asked[key] for key in truth})
        errors = quality.first_errors
        shares = map(_interval, (quality.precision, quality.recall, errors.located, errors.cleared))
        table.add_row(Text(plain(name)), f"{quality.labelled:,}", *shares, _f1(errors), f"{quality.tokens:,}")
    return table
