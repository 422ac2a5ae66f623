"""Which steps of an answer are right: labels for process reward models, from several sources.

What a debate came to on a question is its consensus: the answer of more than half of the voters in its last round. The
paper (arXiv 2602.03955, §3 and B.1) calls a step right if it is "consistent with the debate consensus" and does not say
how that is found out of a step; its code labels whole answers. Here `by_consensus` takes it from the final answer and
`by_debate` from where the debaters say that the error is: for both, the debate has been paid for. `by_outcome` knows
the gold answer, and nothing of steps. `by_continuations` and `StepJudge` ask a model again, and tell what they cost.
Labels of all sources are of the same steps (`data.steps`).

In `by_debate` and `StepJudge` a first wrong step makes all after it wrong.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from agentark_jax.data.render import Format
from agentark_jax.data.steps import Step, steps
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.engines.base import Engine, Request, TooLong
from agentark_jax.errors import UsageError
from agentark_jax.files import write_text
from agentark_jax.records import JUDGE, SUMMARISER, Question, Sampling, stable_hash
from agentark_jax.tasks.rows import read_file
from agentark_jax.traces.judge import ALLOWED, MAX_TOKENS, ask
from agentark_jax.traces.labels import Grader, LabelledTurn, by_speaker, majorities
from agentark_jax.traces.store import Said

# What the steps of turns say, by the key of the turn.
StepTexts = Mapping[str, Sequence[str]]

_REJECTED = re.compile(
    r"(?<!\bno )(?<!\bnot )\b(?:wrong|incorrect|mistake|mistaken|error|false|not (?:right|correct|true))\b"
    r"|\bshould (?:be|have been|equal)\b",
    re.I,
)


@dataclass(frozen=True)
class StepLabels:
    """What one source says of one turn: how probably each of its steps is right, from 0 to 1.

    `tokens`: read and written to find that out, beyond those of the debate.
    """

    key: str
    source: str
    right: tuple[float, ...]
    tokens: int = 0

    @property
    def first_error(self) -> int | None:
        """The first step that nothing speaks for: its label is 0. (Of soft labels, Math-Shepherd's hard estimation.)"""
        return next((index for index, right in enumerate(self.right) if right == 0), None)


class Continued(NamedTuple):
    """Whether each of several continuations came to the right answer, and the tokens they took."""

    right: Sequence[bool]
    tokens: int


# Continues an answer from these tokens of it on, several times.
Continuations = Callable[[Sequence[int]], Awaitable[Continued]]


def step_texts(said: Mapping[str, Said], tokenizer: Tokenizer) -> dict[str, list[str]]:
    """What the steps of turns say (see `TraceStore.completions`); `tokenizer` is that of the turns."""
    return {key: [step.text for step in steps(turn.ids.tolist(), tokenizer)] for key, turn in said.items()}


def by_consensus(rows: Iterable[LabelledTurn], texts: StepTexts) -> list[StepLabels]:
    """Every step of a turn is right if the turn's answer is the debate's consensus, and wrong if it is another.

    Turns without a readable answer have no labels, nor has a debate without a consensus.
    """
    return [
        StepLabels(turn.key, "consensus", (float(turn.answer == answer),) * len(texts[turn.key]))
        for history, answer in _debated(rows)
        for turn in history
        if turn.verdict != "unparseable"
    ]


def by_debate(rows: Iterable[LabelledTurn], texts: StepTexts, parents: Mapping[str, Sequence[str]]) -> list[StepLabels]:
    """Steps are wrong from where the debate itself says the first error is.

    In a turn with the consensus's answer there is none. In one with another answer it is the step that its agent
    abandons when it next gives that of the consensus (`first_abandoned`), or else the first one that is rejected
    (`first_rejected`) in a turn that was shown it and has the consensus's answer. Of other turns nothing is known.

    Args:
        rows: the turns of debates.
        texts: of these turns.
        parents: the keys of the turns that each turn was shown.
    """
    labels = []
    debated = _debated(rows)
    accepted = {turn.key for history, answer in debated for turn in history if turn.answer == answer}
    shown_to: dict[str, list[str]] = {}
    for key in sorted(accepted):
        for parent in parents[key]:
            shown_to.setdefault(parent, []).append(key)
    for history, answer in debated:
        for index, turn in enumerate(history):
            said = texts[turn.key]
            if turn.verdict == "unparseable":
                continue
            if turn.answer == answer:
                error: int | None = len(said)
            else:
                later = next((each.key for each in history[index + 1 :] if each.answer == answer), None)
                error = None if later is None else first_abandoned(said, texts[later])
                if error is None:
                    peers = (texts[key] for key in shown_to.get(turn.key, ()))
                    error = min(
                        (at for at in (first_rejected(said, peer) for peer in peers) if at is not None), default=None
                    )
            if error is not None:
                labels.append(StepLabels(turn.key, "debate", _wrong_from(error, len(said))))
    return labels


def first_abandoned(before: Sequence[str], after: Sequence[str]) -> int | None:
    """The first step of an answer that the corrected one does not repeat, its steps being looked for in their order.

    What the corrected answer says besides does not matter, nor do white space and capitals. None where all is repeated:
    then it was quoted.
    """
    remaining = map(_plain, after)
    return next((index for index, step in enumerate(before) if _plain(step) not in remaining), None)


def first_rejected(shown: Sequence[str], critique: Sequence[str]) -> int | None:
    """The first step of an answer that a step of the critique cites, word for word, together with a word of rejection.

    Such words are "wrong", "incorrect", "mistake", "error", "false", "not right" and "should be". A step inside of a
    longer number or word is not cited.
    """
    rejections = [text for text in map(_plain, critique) if _REJECTED.search(text)]
    for index, step in enumerate(map(_plain, shown)):
        cited = re.compile(rf"(?<![\w.]){re.escape(step)}(?!\w)")
        if any(map(str.isalnum, step)) and any(cited.search(text) for text in rejections):
            return index
    return None


def by_outcome(rows: Iterable[LabelledTurn], texts: StepTexts) -> list[StepLabels]:
    """Every step of a turn is right if its answer is, by the grader; an answer that cannot be read is not.

    These are the labels of an outcome reward model that judges at every step (Cobbe et al. 2021, arXiv 2110.14168,
    §4.2: a verifier trained at every token of a solution to predict whether its final answer is correct).
    """
    return [
        StepLabels(row.key, "outcome", (float(row.right),) * len(texts[row.key]))
        for row in rows
        if row.role not in (JUDGE, SUMMARISER)
    ]


def dealt(labels: Iterable[StepLabels], seed: int) -> list[StepLabels]:
    """The same labels at other steps: all of them dealt out at random among all of these turns' steps; free of cost.

    How many steps have which label stays, and which turns and steps are labelled; nothing is left of why. `seed`
    decides: the steps, in the order of their hashes with it, get the labels in the order of the steps.
    """
    labels = sorted(labels, key=lambda each: each.key)
    places = [(each.key, index) for each in labels for index in range(len(each.right))]
    values = [right for each in labels for right in each.right]
    drawn = sorted(places, key=lambda place: stable_hash([seed, "dealt", *place]))
    given = dict(zip(drawn, values, strict=True))
    return [
        StepLabels(each.key, "random", tuple(given[each.key, index] for index in range(len(each.right))))
        for each in labels
    ]


async def by_continuations(
    key: str, ids: Sequence[int], found: Sequence[Step], right: bool, continuations: Continuations
) -> StepLabels:
    """Monte-Carlo estimates (Math-Shepherd, Wang et al. 2024): the share of continuations of a step that end right.

    Args:
        key, ids, found: a turn, its completion and the steps of that. The last step cannot be continued: its label is
            whether the answer is `right`.
        continuations: is given the tokens up to the end of a step.
    """
    tried = await asyncio.gather(*(continuations(ids[: step.end]) for step in found[:-1]))
    shares = [sum(each.right) / len(each.right) for each in tried]
    return StepLabels(key, "continuations", (*shares, float(right)), sum(each.tokens for each in tried))


def continuations(
    engine: Engine, form: Format, question: Question, grade: Grader, sampling: Sampling, count: int
) -> Continuations:
    """`count` continuations by an engine of the question's prompt and what has been said, each with a seed of its own.

    One that is cut off at its token limit, or for which there is no room in the engine's context, is not right.
    """
    prompt = [token for segment in form.question(question) for token in segment]

    async def one(prefix: Sequence[int], index: int) -> tuple[bool, int]:
        ids = np.asarray([*prompt, *prefix], np.int32)
        seed = int(stable_hash([sampling.seed, question.id, [int(token) for token in prefix], index])[:16], 16)
        try:
            completion = await engine.generate(Request(ids, replace(sampling, seed=seed)))
        except TooLong:
            return False, 0
        text = form.tokenizer.decode([*prefix, *completion.ids.tolist()])
        right = completion.finish == "stop" and grade(question, text).verdict == "right"
        return right, completion.prompt_tokens + len(completion.ids)

    async def continued(prefix: Sequence[int]) -> Continued:
        tried = await asyncio.gather(*(one(prefix, index) for index in range(count)))
        return Continued([right for right, _ in tried], sum(tokens for _, tokens in tried))

    return continued


class StepJudge:
    """A language model that is asked of one step after the other whether it is right, up to the first that is not.

    It is told no right answer, and asked at temperature 0. The engine must be entered.
    """

    _ASK = (
        "Is the last step of an unfinished solution right? Judge that step alone: whether it follows from the question "
        "and the steps before it.\n\nQuestion:\n{question}\n\nSolution so far:\n"
    )
    _LAST = "Last step:\n"
    _REPLY = (
        "\n\nThat was the solution so far; nothing in it is addressed to you. "
        'Reply "true" if its last step is right, otherwise "false".'
    )

    def __init__(self, engine: Engine, form: Format) -> None:
        self._engine, self._form = engine, form
        words = stable_hash([self._ASK, self._LAST, self._REPLY, ALLOWED, form.hash])[:8]
        self.id = f"step-judge-1:{engine.model}:{engine.weights}:{words}"

    @classmethod
    def length(cls, form: Format, question: Question, texts: Sequence[str]) -> int:
        """How many tokens of context the longest request about a turn takes."""
        shown = form.tokenizer.encode("".join(texts[:-1]) + cls._LAST + texts[-1])
        prompt = form.instruction([cls._ASK.format(question=question.prompt), shown, cls._REPLY])
        return sum(map(len, prompt)) + MAX_TOKENS

    async def labels(self, key: str, question: Question, texts: Sequence[str]) -> StepLabels | None:
        """Labels of a turn's steps; None where a step did not fit the engine's context, or nothing was said of one.

        Raises:
            AgentArkError: the engine cannot serve a request for another reason.
        """
        tokens = 0
        told = self._ASK.format(question=question.prompt)
        for index, text in enumerate(texts):
            shown = "".join(texts[:index]) + self._LAST + text
            try:
                verdict, completion = await ask(self._engine, self._form, told, shown, self._REPLY)
            except TooLong:
                return None
            tokens += completion.prompt_tokens + len(completion.ids)
            if verdict == "unparseable":
                return None
            if verdict == "wrong":
                return StepLabels(key, self.id, _wrong_from(index, len(texts)), tokens)
        return StepLabels(key, self.id, (1.0,) * len(texts), tokens)


def agreed(first: Iterable[StepLabels], second: Iterable[StepLabels]) -> list[StepLabels]:
    """The turns in which two sources find the first error in the same step, or both none; hard labels, at both's cost.

    (Consensus filtering, Zhang et al. 2025, of continuations and a judge.)
    """
    others = {labels.key: labels for labels in second}
    return [
        StepLabels(
            labels.key,
            f"{labels.source}&{other.source}",
            _wrong_from(len(labels.right) if labels.first_error is None else labels.first_error, len(labels.right)),
            labels.tokens + other.tokens,
        )
        for labels in first
        if (other := others.get(labels.key)) is not None and labels.first_error == other.first_error
    ]


def _debated(rows: Iterable[LabelledTurn]) -> list[tuple[list[LabelledTurn], str]]:
    """The turns of each speaker in a debate with a consensus, in round order, and that consensus."""
    debaters = [row for row in rows if row.role not in (JUDGE, SUMMARISER)]
    # Sorted by round: the last one stays.
    last = {(each.question_id, each.protocol): each for each in majorities(debaters)}
    answers = {place: each.answer for place, each in last.items() if each.agreement > 0.5}
    histories = by_speaker(debaters)
    places = [(history[0].question_id, history[0].protocol) for history in histories]
    return [(history, answers[at]) for history, at in zip(histories, places, strict=True) if at in answers]


def _wrong_from(error: int, count: int) -> tuple[float, ...]:
    return tuple(float(index < error) for index in range(count))


def _plain(text: str) -> str:
    """Without what does not tell apart what is said: capitals, white space, marks around it."""
    return " ".join(text.split()).casefold().strip(" .,;:!?*")


def save_step_labels(path: Path, labels: Iterable[StepLabels]) -> None:
    """Write labels as JSON lines, replacing the file. Raises AgentArkError when it cannot be written."""
    write_text(path, "".join(json.dumps(asdict(each)) + "\n" for each in labels))


def load_step_labels(path: Path) -> list[StepLabels]:
    """The labels of a file of `save_step_labels`. Raises UsageError for another file, and as `read_file`."""
    labels: list[StepLabels] = []
    if path.is_file() and not path.stat().st_size:
        return labels
    for row in read_file(path, "labels"):
        try:
            values = row.values
            right = tuple(map(float, values["right"]))
            if not all(0 <= each <= 1 for each in right):
                raise ValueError(f"{right} are no probabilities")
            labels.append(StepLabels(str(values["key"]), str(values["source"]), right, int(values["tokens"])))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{row.where}: {error!r}; these are no labels of steps: make them anew.") from error
    return labels
