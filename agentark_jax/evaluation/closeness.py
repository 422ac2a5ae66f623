"""How close free answers come to the gold ones, over questions of which several may ask about one document."""

from collections.abc import Mapping, Sequence
from typing import Any

from agentark_jax.evaluation import figures
from agentark_jax.records import Question, stable_hash


def document(question: Question) -> str:
    """The same for questions about one document, which stands before each of them; else the question's own id."""
    before = question.prompt.removesuffix(question.asked)
    return stable_hash(before) if before.strip() else question.id


def closeness_figures(
    scores: Sequence[Mapping[str, float]], questions: Sequence[Question], *, level: float
) -> dict[str, Any]:
    """The mean of each score with a bootstrap interval over documents; `documents` are how many there are."""
    documents = [document(question) for question in questions]
    names = list(scores[0]) if scores else []
    found = {name: figures.mean([each[name] for each in scores], documents, level=level) for name in names}
    return {
        "n": len(scores),
        "documents": len(set(documents)),
        "scores": {
            name: figure and {key: value for key, value in figure.items() if key != "questions"}
            for name, figure in found.items()
        },
    }
