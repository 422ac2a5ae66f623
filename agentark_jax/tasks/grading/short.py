"""Free short answers: right where they are a gold answer, and scored by how close they come."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from agentark_jax.records import Grade, Question
from agentark_jax.tasks.grading.reading import ANSWER_PHRASE, HEADED, MAX_ANSWER_LENGTH, Unreadable, trimmed

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Punctuation that makes another number of one: 12.5 is not 125, 1/2 not 12, 10:30 not 1030, and 5 % not 5.
_POINT, _MINUS = re.compile(r"\.(?=[0-9])"), re.compile(r"(?<![^\s(])[-−](?=[0-9.])")
_THOUSANDS, _PERCENT = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))"), re.compile(r"(?<=[0-9]) ?%")
_BETWEEN_DIGITS = re.compile(r"(?<=[0-9]) ?[-–/:^+*,'’] ?(?=[0-9])")
_BOUND, _SHARP = re.compile(r"[<>~](?= ?[0-9])"), re.compile(r"(?<=[A-Za-z0-9])(?:#|\+\+?)(?![A-Za-z0-9])")
_KEPT = dict(zip("-–/:^+*,'’<>~#", "‐‐∕∶↑⊕∗⸲′′‹›≈♯", strict=True))
_YES_NO = re.compile(r"(yes|no)[,.;:!]", re.I)
UNANSWERABLE = "unanswerable"
_REFUSALS = frozenset(
    """unanswerable|not answerable|cannot be answered|can not be answered|cant be answered|no answer
    |question cannot be answered|question is unanswerable|it cannot be answered|not enough information
    |insufficient information""".replace("\n    ", "").split("|")
)
SCORES = ("EM", "F1", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU")

# A gold answer of more words is prose. HotpotQA's longest has as many.
_SHORT_WORDS = 10
# Characters of an answer to a question with such a gold; QMSum's longest gold has 1,238.
_PROSE = replace(HEADED, limit=4000)


class Short:
    """The words of one of the gold answers: `question.meta["answers"]`, or `question.answer` alone.

    Case, punctuation outside numbers, articles and white space do not count, as in SQuAD's normalisation. "Yes, ..."
    is a yes, unless it goes on with a no; the usual ways to say that there is no answer are one: "unanswerable".

    Where a gold is prose, other words may say the same, and no count of common words tells them from a wrong answer to
    the same question. What is no gold word for word is then unparseable, for a judge to decide, and no answer, right
    or not, is one to vote for: `answer` is empty.
    """

    id = "short-3"
    instruction = f'End with "{ANSWER_PHRASE} ...", as few words as will do, and nothing after it.'

    def __call__(self, question: Question, text: str) -> Grade:
        golds, said = gold_answers(question), read_free(question, text)
        answer = spelled(said)
        if not answer:
            return Grade("unparseable", detail="no short answer")
        right = any(_says(said, gold) for gold in golds)
        if any(map(is_prose, golds)):
            return Grade("right") if right else Grade("unparseable", detail="not a gold answer word for word")
        return Grade("right" if right else "wrong", answer)


def is_prose(gold: str) -> bool:
    """Whether there are other ways to say a gold answer: it is long, or a yes or no that gives its reason."""
    return len(gold.split()) > _SHORT_WORDS or (spelled(gold) in ("yes", "no") and _words(gold) not in ("yes", "no"))


def _says(answer: str, gold: str) -> bool:
    alike = _words if is_prose(gold) else spelled
    return alike(answer) == alike(gold)


def read_free(question: Question, text: str) -> str:
    """The answer that a text gives to a question; empty for none.

    Where a gold is prose, that is what follows the answer phrase, or the whole text where none announces it.
    """
    if not any(map(is_prose, gold_answers(question))):
        return short_answer(text)
    read = _PROSE.read(text)
    if not isinstance(read, Unreadable):
        return read
    text = trimmed(text)
    return text if len(text) <= _PROSE.limit else ""


def gold_answers(question: Question) -> Sequence[str]:
    """All answers that count as right."""
    answers: Sequence[str] = question.meta.get("answers") or [question.answer]
    return answers


def short_answer(text: str) -> str:
    """The short answer of a text: what follows its answer phrase, or a text of one line; empty for none."""
    read = HEADED.read(text)
    if not isinstance(read, Unreadable):
        return read
    text = trimmed(text)
    unannounced = len(text) <= MAX_ANSWER_LENGTH and "\n" not in text and not HEADED.phrase.search(text)
    return text if unannounced and "\\boxed" not in text else ""


def spelled(answer: str) -> str:
    """One spelling of answers that say the same."""
    words = _words(answer)
    if words in _REFUSALS:
        return UNANSWERABLE
    decided = _YES_NO.match(answer.strip())
    if decided is not None and len({"yes", "no", "not", "maybe"} & set(words.split())) == 1:
        return decided[1].lower()
    return words


def _words(answer: str) -> str:
    answer = _THOUSANDS.sub("", _PERCENT.sub(" percent", _MINUS.sub("−", answer)))
    for pattern in (_BETWEEN_DIGITS, _BOUND, _SHARP):
        answer = pattern.sub(lambda match: "".join(_KEPT[mark] for mark in match.group().replace(" ", "")), answer)
    return squad_normalised(_POINT.sub("·", answer))


def squad_normalised(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space, as SQuAD's evaluation has it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 where the answer is one of the gold answers after SQuAD's normalisation, otherwise 0."""
    return float(squad_normalised(answer) in {squad_normalised(gold) for gold in golds})


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """The largest F1 of the words of the answer and of a gold answer, in [0, 1] (SQuAD)."""
    return max(_f1(squad_normalised(answer).split(), squad_normalised(gold).split()) for gold in golds)


def _f1(said: list[str], gold: list[str]) -> float:
    if not said or not gold:
        return float(said == gold)
    common = (Counter(said) & Counter(gold)).total()
    return 2 * common / (len(said) + len(gold))


def rouge(answer: str, golds: Sequence[str]) -> dict[str, float]:
    """F-measures ROUGE-1, ROUGE-2 and ROUGE-L with stemming, each the largest over the gold answers, in [0, 1]."""
    found = [_rouge_scorer().score(gold, answer) for gold in golds]
    return {f"ROUGE-{kind}": max(float(score[f"rouge{kind}"].fmeasure) for score in found) for kind in "12L"}


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def bleu(answer: str, golds: Sequence[str]) -> float:
    """Smoothed sentence BLEU against all gold answers at once, in [0, 1]."""
    import sacrebleu

    return float(sacrebleu.sentence_bleu(answer, list(golds), use_effective_order=True).score) / 100


def scores(question: Question, text: str) -> dict[str, float]:
    """How close the answer of a text comes to the gold answers, by `SCORES`, in [0, 1]; 0 where it gives no answer."""
    golds, said = gold_answers(question), read_free(question, text)
    if not said:
        return dict.fromkeys(SCORES, 0.0)
    found = {"EM": exact_match(said, golds), "F1": token_f1(said, golds)}
    return {**found, **rouge(said, golds), "BLEU": bleu(said, golds)}
