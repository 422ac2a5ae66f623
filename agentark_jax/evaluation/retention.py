"""What a model keeps of the one it was made from, on the reasoning of given solutions and on nothing else.

Of each solution the tokens of the reasoning count: not the question, not what every answer begins with (Qwen3's empty
thought), not the sentence that states the answer. On these the negative log-likelihood (NLL) and the perplexity of both
models are compared, as AgentArk does (per sample, then averaged), and their distributions by KL divergence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from agentark_jax.data.render import Format, completion_example
from agentark_jax.data.weighting import REASONING, reasoning_and_answer
from agentark_jax.evaluation.statistics import bootstrap_interval
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.transformer import Params, hidden_states
from agentark_jax.records import Question

_SHORTEST = 32  # tokens of a row; shorter ones save nothing


@dataclass(frozen=True)
class Span:
    """A solution as a model reads it: `ids` [T] of question and solution, and which of them are reasoning [T]."""

    question_id: str
    ids: Int[np.ndarray, " T"]
    reasoning: Bool[np.ndarray, " T"]

    @property
    def targets(self) -> Int[np.ndarray, " N"]:
        return self.ids[self.reasoning]


@dataclass(frozen=True)
class Tokens:
    """What two models say of N tokens of reasoning, in nats.

    Attributes:
        sample: of which solution each is, counted from 0.
        base: its negative log-likelihood by the base model.
        model: and by the other.
        forward: KL(base‖model) where it stands.
        reverse: KL(model‖base).
    """

    sample: Int[np.ndarray, " N"]
    base: Float[np.ndarray, " N"]
    model: Float[np.ndarray, " N"]
    forward: Float[np.ndarray, " N"]
    reverse: Float[np.ndarray, " N"]


def reasoning_spans(questions: Sequence[Question], form: Format) -> list[Span]:
    """The gold rationales after their questions; those that state an answer and give no reason are left out."""
    begun = zip(*(form.response(text) for text in ("1", "The", "so")), strict=False)
    opening = next(place for place, tokens in enumerate(begun) if len(set(tokens)) > 1)
    found = []
    for question in questions:
        if not question.rationale:
            continue
        prompt, response = form.question(question), form.response(question.rationale)
        example = completion_example(prompt, response, question_id=question.id, variant="retention")
        reasoning = reasoning_and_answer(example, form.tokenizer).weights[REASONING] > 0
        # The end token closes a solution that states no answer; it is no reasoning either.
        reasoning[-1] = False
        begin = len(reasoning) - len(response)
        reasoning[begin : begin + opening] = False
        if reasoning.any():
            found.append(Span(question.id, example.ids, reasoning))
    return found


def span_states(
    config: ModelConfig, params: Params, spans: Sequence[Span], *, tokens: int = 4096
) -> Float[np.ndarray, "N D"]:
    """Hidden states after the final norm at the position before each token of reasoning, span after span.

    `tokens` are those of a batch, padding included, at most; a single row may be longer. Lengths are powers of two, so
    that few programs are compiled.
    """
    found: list[np.ndarray] = [np.zeros(0)] * len(spans)
    waiting = sorted(range(len(spans)), key=lambda index: len(spans[index].ids), reverse=True)
    while waiting:
        longest = len(spans[waiting[0]].ids)
        length = min(max(_SHORTEST, 1 << (longest - 1).bit_length()), config.max_positions)
        rows = max(1, tokens // length)
        now, waiting = waiting[:rows], waiting[rows:]
        batch = np.zeros((rows, length), np.int32)
        for row, index in enumerate(now):
            batch[row, : len(spans[index].ids)] = spans[index].ids
        states = np.asarray(_hidden(config, params, batch))
        for row, index in enumerate(now):
            found[index] = states[row, np.flatnonzero(spans[index].reasoning) - 1]
    return np.concatenate(found)


@partial(jax.jit, static_argnums=0)
def _hidden(config: ModelConfig, params: Params, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    positions = jax.numpy.broadcast_to(jax.numpy.arange(ids.shape[1], dtype=jax.numpy.int32), ids.shape)
    # Padding stands to the right: no token before it sees it.
    return hidden_states(config, params, ids, positions)


def retention_figures(found: Tokens, questions: Sequence[str], *, level: float = 0.95) -> dict[str, Any]:
    """NLL, perplexity and divergence, each per sample and by tokens, with bootstrap intervals over questions.

    Args:
        questions: of each sample, by id.

    `by_sample` are means of each sample, averaged over samples: the perplexity is the mean of theirs, as in the paper.
    `by_token` each token counts the same: the perplexity is that of the mean NLL. `difference` is model − base, paired;
    of perplexities by tokens too.
    """
    sizes = np.bincount(found.sample, minlength=len(questions)).astype(np.float64)
    clusters = np.asarray(questions)

    def sums(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " samples"]:
        return np.bincount(found.sample, values.astype(np.float64), minlength=len(questions))

    base, model = sums(found.base), sums(found.model)

    def figure(statistic: Any, *columns: np.ndarray) -> dict[str, Any]:
        (value,) = statistic(np.ones((1, len(questions))), *columns)
        interval = bootstrap_interval(statistic, *columns, clusters=clusters, level=level)
        low, high = interval or (None, None)
        return {"value": float(value), "low": low, "high": high}

    def averaged(values: np.ndarray) -> dict[str, Any]:
        return figure(lambda drawn, column: drawn @ column / drawn.sum(1), values)

    def weighted(values: np.ndarray) -> dict[str, Any]:
        return figure(lambda drawn, total, size: drawn @ total / (drawn @ size), values, sizes)

    def perplexity(values: np.ndarray) -> dict[str, Any]:
        return figure(lambda drawn, total, size: np.exp(drawn @ total / (drawn @ size)), values, sizes)

    def surplus(drawn: np.ndarray, ours: np.ndarray, theirs: np.ndarray, size: np.ndarray) -> np.ndarray:
        return np.exp(drawn @ ours / (drawn @ size)) - np.exp(drawn @ theirs / (drawn @ size))

    divergence = {"forward_kl": sums(found.forward), "reverse_kl": sums(found.reverse)}
    return {
        "n": len(questions),
        "questions": int(np.unique(clusters).size),
        "tokens": len(found.sample),
        "by_sample": {
            "nll": {
                "base": averaged(base / sizes),
                "model": averaged(model / sizes),
                "difference": averaged((model - base) / sizes),
            },
            "perplexity": {
                "base": averaged(np.exp(base / sizes)),
                "model": averaged(np.exp(model / sizes)),
                "difference": averaged(np.exp(model / sizes) - np.exp(base / sizes)),
            },
            **{name: averaged(values / sizes) for name, values in divergence.items()},
        },
        "by_token": {
            "nll": {"base": weighted(base), "model": weighted(model), "difference": weighted(model - base)},
            "perplexity": {
                "base": perplexity(base),
                "model": perplexity(model),
                "difference": figure(surplus, model, base, sizes),
            },
            **{name: weighted(values) for name, values in divergence.items()},
        },
    }
