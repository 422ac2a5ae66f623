"""The process reward model of a run: labels of the steps of its debates, and the model that is trained on them.

Bodies of stages: pure functions of the trace store and their configuration that write into the directory of their
`Work` and may be killed at any moment.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from agentark_jax.data.config import PromptConfig
from agentark_jax.data.render import Format, step_example
from agentark_jax.data.steps import Step, coverage, steps
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.errors import AgentArkError
from agentark_jax.evaluation.best_of_n import Candidates, best_of_n, outcome_correlation
from agentark_jax.evaluation.first_error_baselines import Judged, compare
from agentark_jax.files import write_json
from agentark_jax.generation import Generation, Model, Seat
from agentark_jax.models.transformer import param_shapes
from agentark_jax.objectives.prm import PRM
from agentark_jax.progress import Bar, Display
from agentark_jax.protocols.calls import Draw
from agentark_jax.records import JUDGE, SUMMARISER, Example, Question, Sampling, stable_hash
from agentark_jax.stages import Work
from agentark_jax.tasks import word_problems
from agentark_jax.traces.labels import Grader, LabelledTurn
from agentark_jax.traces.step_labels import (
    Continued,
    StepJudge,
    StepLabels,
    agreed,
    by_consensus,
    by_continuations,
    by_debate,
    by_outcome,
    continuations,
    dealt,
    load_step_labels,
    save_step_labels,
)
from agentark_jax.traces.store import TraceStore
from agentark_jax.training.checkpoint import remove_checkpoints
from agentark_jax.training.config import FitConfig, MeshConfig
from agentark_jax.training.job import Job, train
from agentark_jax.training.loop import FitResult, examples_hash
from agentark_jax.training.mesh import make_mesh
from agentark_jax.training.prm import CARD_FILE, Card, load_prm, prm_fingerprint, read_card, write_card
from agentark_jax.training.prm_config import PRMConfig
from agentark_jax.training.scoring import score_steps
from agentark_jax.training.state import partition

LABELS, PAID = "labels.jsonl", "paid.jsonl"
FROZEN, WHOLE = "frozen", "whole"
TRAINING = "training.json"


@dataclass(frozen=True)
class Answer:
    """A turn as steps: its completion's ids, their tokenizer's hash, the turns it was shown, and the steps."""

    ids: list[int]
    tokenizer: str
    parents: Sequence[str]
    steps: list[Step]

    @property
    def texts(self) -> list[str]:
        return [step.text for step in self.steps]


def answers_of(
    store: TraceStore, keys: Iterable[str], tokenizers: Iterable[Tokenizer]
) -> tuple[dict[str, Answer], dict[str, int]]:
    """The successful turns among these, as steps, and how many have another tokenizer, of which nothing is known."""
    known = {tokenizer.hash: tokenizer for tokenizer in tokenizers}
    answers: dict[str, Answer] = {}
    other = 0
    for turn in store.turns(keys=keys, errors=False):
        assert turn.completion is not None, "turns without errors have one"
        tokenizer = known.get(turn.call.tokenizer)
        if tokenizer is None:
            other += 1
            continue
        ids = turn.completion.ids.tolist()
        answers[turn.key] = Answer(ids, tokenizer.hash, turn.call.parents, steps(ids, tokenizer))
    return answers, {"other_tokenizer": other}


def chosen(rows: Iterable[LabelledTurn], config: PRMConfig) -> set[str]:
    """The turns to label: `config.turns` answers of debaters to each of `config.questions` questions, drawn by hash."""
    questions: dict[str, list[str]] = {}
    for row in rows:
        if row.role not in (JUDGE, SUMMARISER):
            questions.setdefault(row.question_id, []).append(row.key)
    drawn = sorted(questions, key=lambda question: stable_hash(["labelled", question]))[: config.questions]
    return {key for question in drawn for key in sorted(questions[question])[: config.turns]}


def label_steps(
    work: Work,
    config: PRMConfig,
    rows: Sequence[LabelledTurn],
    store: TraceStore,
    *,
    grade: Grader,
    draw: Draw,
    seed: int,
    generation: Generation,
    display: Display,
    tokenizers: Iterable[Tokenizer],
    speaker: Seat | None = None,
    judge: Seat | None = None,
) -> list[StepLabels]:
    """Labels of the steps of a debate's turns, by the configured source, sorted by turn; also in `labels.jsonl`.

    Answers of models are kept in `paid.jsonl` as they come, so that a stage that was killed goes on where it was: of
    what it paid for, only what was not answered yet is lost. Equal beginnings of answers to a question are continued
    once, and equal answers judged once; the first turn that has them, by key, bears the cost.

    Args:
        work: gets `labelled` of `turns`, those of an `other_tokenizer`, `tokens` that labels cost, and `coverage`-like
            counts of `right` and `wrong` steps (from a half on).
        rows: all turns of the debates (`traces.labels.labelled_turns`), also where few of them are labelled: what the
            debate came to is in all of them.
        grade: says whether a continuation ends with the right answer.
        draw: how continuations are drawn, with seeds that follow from `seed`.
        tokenizers: of all who spoke.
        speaker: who continues answers, in its own tokenizer; needed where labels take continuations.
        judge: who is asked of steps; needed where labels take a judge.

    Raises:
        AgentArkError: an engine cannot serve, a turn's question is not in the store, or files cannot be written.
    """
    answers, counts = answers_of(store, [row.key for row in rows], tokenizers)
    rows = [row for row in rows if row.key in answers]
    labelled = chosen(rows, config)
    questions = {question.id: question for question in store.questions()}
    asked = [row for row in sorted(rows, key=lambda row: row.key) if row.key in labelled]
    texts = {key: answer.texts for key, answer in answers.items()}

    def continued(journal: "Journal") -> list[StepLabels]:
        assert speaker is not None, "continuations need a speaker"
        sampling = Sampling(draw.temperature, draw.max_tokens, speaker.model.form.stop_ids, seed)
        mine = [row for row in asked if answers[row.key].tokenizer == speaker.model.form.tokenizer.hash]
        counts["not_continued"] = len(asked) - len(mine)
        found = asyncio.run(
            _continued(mine, answers, questions, grade, sampling, config.continuations, generation, speaker, journal)
        )
        return [_hard(each) for each in found] if config.hard else found

    def judged(journal: "Journal") -> list[StepLabels]:
        assert judge is not None, "judgements need a judge"
        return asyncio.run(_judged(asked, texts, questions, generation, judge, journal))

    if config.labels == "consensus":
        found = by_consensus(rows, texts)
    elif config.labels == "debate":
        found = by_debate(rows, texts, {key: answer.parents for key, answer in answers.items()})
    elif config.labels == "outcome":
        found = by_outcome(rows, texts)
    else:
        with journal(work.directory / PAID, display, f"label steps by {config.labels}") as paid:
            if config.labels == "continuations":
                found = continued(paid)
            elif config.labels == "judge":
                found = judged(paid)
            else:
                by_speaker = continued(paid)
                generation.release()  # the judge may be another model
                found = agreed(by_speaker, judged(paid))
    found = sorted((each for each in found if each.key in labelled), key=lambda each: each.key)
    work.counts |= {**counts, "turns": len(asked)}
    _keep(work, found)
    return found


def deal_labels(work: Work, labels: Path, seed: int) -> None:
    """The labels of a file, dealt out at random (`traces.step_labels.dealt`): `labels.jsonl`, counted as others are."""
    _keep(work, dealt(load_step_labels(labels), seed))


def _keep(work: Work, found: Sequence[StepLabels]) -> None:
    save_step_labels(work.directory / LABELS, found)
    values = [right for each in found for right in each.right]
    work.tokens = sum(each.tokens for each in found)
    work.counts |= {
        "labelled": len(found),
        "right": sum(value >= 0.5 for value in values),
        "wrong": sum(value < 0.5 for value in values),
        "tokens": work.tokens,
    }


def _hard(labels: StepLabels) -> StepLabels:
    return replace(labels, right=tuple(float(right > 0) for right in labels.right))


class Journal:
    """Answers that were paid for, by key: a line of JSON each, on disk as soon as it is `put`. Use `journal`."""

    def __init__(self, path: Path, bar: Bar):
        self._bar, self._done, self._total = bar, 0, 0
        self._known: dict[str, Any] = {}
        content = path.read_bytes() if path.exists() else b""
        # A process that was killed while it wrote leaves a line without an end: that answer is asked for again.
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError) as error:
                raise AgentArkError(f"{path}, line {number}: damaged ({error}); remove the line.") from error
            self._known[key] = value
        self._file = path.open("ab")
        self._file.truncate(len(whole))

    def expect(self, count: int) -> None:
        """So many answers, known or not, will be asked for."""
        self._total += count

    async def answer(self, key: str, ask: Callable[[], Awaitable[Any]]) -> Any:
        """The answer that is known, or the one that `ask` gives (a JSON value), which is then known."""
        if key not in self._known:
            value = await ask()
            self._known[key] = value
            self._file.write(json.dumps([key, value]).encode() + b"\n")
            self._file.flush()
        self._done += 1
        self._bar.set(self._done, self._total, 0)
        return self._known[key]

    def close(self) -> None:
        self._file.close()


@contextmanager
def journal(path: Path, display: Display, title: str) -> Iterator[Journal]:
    """A journal for the time of the block, and a bar that counts its answers."""
    with display.bar(title, total=None) as bar:
        opened = Journal(path, bar)
        try:
            yield opened
        finally:
            opened.close()


async def _continued(
    rows: Sequence[LabelledTurn],
    answers: Mapping[str, Answer],
    questions: Mapping[str, Question],
    grade: Grader,
    sampling: Sampling,
    count: int,
    generation: Generation,
    speaker: Seat,
    journal: Journal,
) -> list[StepLabels]:
    """Labels by continuations: all distinct beginnings are continued at once, then the labels are put together."""
    form = speaker.model.form
    beginnings = {
        (row.question_id, tuple(answers[row.key].ids[: step.end]))
        for row in rows
        for step in answers[row.key].steps[:-1]
    }
    asked = {question: sum(map(len, form.question(questions[question]))) for question in {at for at, _ in beginnings}}
    longest = max((asked[question] + len(prefix) for question, prefix in beginnings), default=1)
    found: dict[Hashable, Continued] = {}
    async with generation.engine(speaker, longest + sampling.max_tokens) as engine:
        origin = [engine.model, engine.weights, form.hash, sampling.to_json(), count]

        async def one(question: str, prefix: tuple[int, ...]) -> None:
            async def ask() -> Any:
                return list(await continuations(engine, form, questions[question], grade, sampling, count)(prefix))

            key = stable_hash(["continuations", origin, question, prefix])
            found[question, prefix] = Continued(*await journal.answer(key, ask))

        journal.expect(len(beginnings))
        await asyncio.gather(*(one(*beginning) for beginning in sorted(beginnings)))

    paid: set[Hashable] = set()

    def known(question: str) -> Callable[[Sequence[int]], Awaitable[Continued]]:
        async def lookup(prefix: Sequence[int]) -> Continued:
            place = (question, tuple(prefix))
            tokens = 0 if place in paid else found[place].tokens
            paid.add(place)
            return found[place]._replace(tokens=tokens)

        return lookup

    return [
        await by_continuations(
            row.key, answers[row.key].ids, answers[row.key].steps, row.verdict == "right", known(row.question_id)
        )
        for row in rows
    ]


async def _judged(
    rows: Sequence[LabelledTurn],
    texts: Mapping[str, Sequence[str]],
    questions: Mapping[str, Question],
    generation: Generation,
    seat: Seat,
    journal: Journal,
) -> list[StepLabels]:
    """Labels by a judge, of the turns about whose steps it said something."""
    form = seat.model.form
    longest = max((StepJudge.length(form, questions[row.question_id], texts[row.key]) for row in rows), default=1)
    async with generation.engine(seat, longest) as engine:
        judge = StepJudge(engine, form)
        places = {row.key: (row.question_id, tuple(texts[row.key])) for row in rows}
        found: dict[Hashable, Any] = {}

        async def one(question: str, said: tuple[str, ...]) -> None:
            async def ask() -> Any:
                labels = await judge.labels("", questions[question], said)
                return None if labels is None else [labels.right, labels.tokens]

            found[question, said] = await journal.answer(stable_hash([judge.id, question, said]), ask)

        distinct = sorted(set(places.values()))
        journal.expect(len(distinct))
        await asyncio.gather(*(one(*place) for place in distinct))
    labels: list[StepLabels] = []
    paid: set[Hashable] = set()
    for key, place in places.items():
        if found[place] is not None:
            right, tokens = found[place]
            labels.append(StepLabels(key, judge.id, tuple(right), 0 if place in paid else tokens))
            paid.add(place)
    return labels


def step_examples(
    form: Format, store: TraceStore, labels: Iterable[StepLabels]
) -> tuple[list[Example], dict[str, int]]:
    """What the student `form` belongs to learns from labels, sorted by turn; and counts.

    Turns whose steps are others for the student's tokenizer (`data.render.step_example`) are left out and counted as
    `retokenised_apart`; the other counts are those of `data.steps.coverage`.

    Raises AgentArkError where nothing is left, and as `step_example`.
    """
    right = {each.key: each.right for each in labels}
    questions = {question.id: question for question in store.questions()}
    made = [
        step_example(form, questions[turn.call.question_id], turn, right[turn.key])
        for turn in store.turns(keys=right, errors=False)
    ]
    examples = [example for example in made if example is not None]
    if not examples:
        raise AgentArkError(
            f"{store.path}: of {len(right)} turns with labels none teaches anything: there is no process reward model "
            "to train. Take another source with prm.labels."
        )
    return examples, {"retokenised_apart": len(made) - len(examples), **coverage(examples)}


def train_prm(
    work: Work,
    config: PRMConfig,
    student: Model,
    prompt: PromptConfig,
    examples: Sequence[Example],
    validation: Sequence[Example] = (),
    *,
    labels: str | None = None,
    seed: int,
    display: Display,
    published: Mapping[str, Any] | None = None,
) -> Path:
    """Trains a process reward model that starts from the student; its directory, which `load_prm` reads.

    Stage I is `frozen/`, stage II `whole/`, which starts from the model, head and projector of I. A stage that is
    finished for the same examples and settings is not done again, one that was killed goes on at its last checkpoint.

    Args:
        work: gets `location` and `revision` of the model, counts of the examples, and of each stage its steps, tokens
            and losses.
        prompt: what makes `student.form`.
        examples: with steps (`step_examples`).
        validation: needed where a stage has `eval_every`.
        labels: what the model's card calls their source; None: as `config` does.
        published: what the model's card tells of labels that are a dataset's (`training.prm.Card`).

    Raises as `training.job.train`, and AgentArkError for the paper's loss where no question has a right step in one
    answer and a wrong one in another: it would teach nothing.
    """
    objective = PRM(config.terms(), config.temperature, config.wrong_weight)
    counts = coverage(examples)
    if objective.coefficients.keys() == {"contrastive"} and not counts["contrasted"]:
        raise AgentArkError(
            f"prm: none of {counts['questions']} questions has a right step in one answer and a wrong one in another: "
            "the contrastive loss would teach nothing. Give more questions or harder ones, take another source with "
            "prm.labels, or add a term: prm.coefficients {cross_entropy: 1.0}."
        )
    work.counts |= {"examples": counts}
    model, revision = student.directory, student.revision
    for name, fit in ((FROZEN, config.frozen), (WHOLE, config.whole)):
        if fit is None:
            continue
        directory = work.directory / name
        hashes = [examples_hash(examples), examples_hash(validation)]
        made_from = stable_hash([fit.fingerprint(), repr(objective), revision, hashes, seed])
        if not _finished(directory / "model", made_from):
            directory.mkdir(parents=True, exist_ok=True)
            job = Job(fit, model, revision, examples, validation, directory, seed, objective)
            with display.bar(f"train the process reward model ({name})", total=1) as bar:
                result = train(job, bar.set)
            write_json(directory / TRAINING, _record(result, fit, student))
            form = student.form
            card = Card(
                tokenizer=form.tokenizer.hash,
                template=form.hash,
                prompt=prompt,
                labels=labels or config.labels,
                coefficients={str(term): factor for term, factor in objective.coefficients.items()},
                temperature=objective.temperature,
                made_from=made_from,
                counts=counts,
                published=published or {},
            )
            write_card(directory / "model", card)
        remove_checkpoints(directory)
        record = json.loads((directory / TRAINING).read_text(encoding="utf-8"))
        work.counts[name] = {key: value for key, value in record.items() if key not in ("history", "validation")}
        work.tokens += record["tokens"]
        model, revision = directory / "model", prm_fingerprint(directory / "model")
    work.counts |= {"location": str(model.relative_to(work.directory)), "revision": revision}
    return model


def _finished(model: Path, made_from: str) -> bool:
    return (model / CARD_FILE).is_file() and read_card(model).made_from == made_from


def _record(result: FitResult, fit: FitConfig, student: Model) -> dict[str, Any]:
    trained: Any = result.adapter
    if trained is None:
        trained = partition(param_shapes(student.config), fit.freeze, last_layers=fit.last_layers)[0]
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "labelled_steps": result.loss_tokens,
        "trainable": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves([trained, result.extra])),
        "final_loss": result.history[-1][1],
        "stopped": result.stopped,
        "history": result.history,
        "validation": result.validation_history,
    }


def evaluate_prm(
    work: Work,
    directory: Path,
    store: TraceStore,
    *,
    sampled: Sequence[LabelledTurn],
    debated: Sequence[LabelledTurn],
    level: float,
) -> None:
    """How well a process reward model judges answers that it was not trained on.

    `work` gets, as JSON values with intervals: `best_of_n` of independent samples by each of two aggregates against
    their vote and a random pick, `outcome`, how the least probable step goes with the answer's being right, and, of
    word problems, whose steps are known to be right or wrong, `first_errors` in a debate's answers beside the two
    baselines, each with a threshold that was fitted on other questions.

    Args:
        directory: the model's.
        sampled: as many answers to each question.
        debated: answers of debaters.
    """
    mesh = make_mesh(MeshConfig())
    prm = load_prm(directory, mesh)
    rows = [*sampled, *(row for row in debated if row.role not in (JUDGE, SUMMARISER))]
    answers, counts = answers_of(store, [row.key for row in rows], [prm.form.tokenizer])
    questions = {question.id: question for question in store.questions()}
    prompts = {
        name: [token for part in prm.form.question(questions[name]) for token in part]
        for name in {row.question_id for row in rows}
    }
    rows = [row for row in rows if row.key in answers]
    asked = [(prompts[row.question_id], answers[row.key]) for row in rows]
    sequences = [
        ([*prompt, *answer.ids], [len(prompt) + step.end - 1 for step in answer.steps]) for prompt, answer in asked
    ]
    said = score_steps(prm.config, prm.params, prm.head, sequences, mesh)
    scores = dict(zip((row.key for row in rows), said, strict=True))
    by_question: dict[str, list[LabelledTurn]] = {}
    for row in sampled:
        if row.key in scores:
            by_question.setdefault(row.question_id, []).append(row)
    candidates = [
        Candidates(
            name,
            tuple(row.right for row in turns),
            tuple(row.answer for row in turns),
            tuple(scores[row.key] for row in turns),
        )
        for name, turns in by_question.items()
    ]
    judged = []
    for row in debated:
        question = questions[row.question_id]
        truth = None
        if row.key in scores and question.task == word_problems.NAME:
            truth = word_problems.exact_step_truth(question, answers[row.key].texts)
        if truth is not None:
            right = np.asarray(truth, bool)
            lengths = np.asarray([step.end - step.start for step in answers[row.key].steps])
            error = None if right.all() else int(np.argmin(right))
            known, lines = np.ones(len(right), bool), np.arange(len(right))
            judged.append(Judged(question.id, scores[row.key], lengths, right, known, lines, error))
    work.counts |= {
        **counts,
        "best_of_n": [asdict(best_of_n(candidates, name, level=level)) for name in ("min", "mean")],
        "outcome": asdict(outcome_correlation(candidates, "min", level=level)),
        "first_errors": {
            name: {**asdict(found), "f1": found.errors.f1} for name, found in compare(judged, None, name="prm").items()
        }
        if judged
        else None,
    }
