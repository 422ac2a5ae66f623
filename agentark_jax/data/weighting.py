"""What each token of a trajectory counts: R-SFT's two terms, and the shares of a question's several paths in DA."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from agentark_jax.data.spans import spans
from agentark_jax.data.steps import answer_begins
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.errors import AgentArkError
from agentark_jax.records import Example

Weighting = Literal["tokens", "questions", "paths"]
COMPLETION, REASONING, ANSWER = "completion", "reasoning", "answer"


def reasoning_and_answer(example: Example, tokenizer: Tokenizer) -> Example:
    """The loss term `completion` as the two of R-SFT (AgentArk §2.1): `reasoning`, and `answer` from its phrase on.

    The phrase is the last "The answer is", "####" or "\\boxed{" of the text; the token that holds its first character
    begins the answer, which has the end token as well. A completion without one is all reasoning.
    """
    weights = example.weights[COMPLETION]
    places = np.flatnonzero(weights)
    begin = _first_of_answer(example.ids[places].tolist(), tokenizer)
    answer = np.zeros_like(weights)
    answer[places[begin:]] = weights[places[begin:]]
    return replace(example, weights={REASONING: weights - answer, ANSWER: answer})


def _first_of_answer(ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """Index of the token with the first character of the answer's phrase; their number where there is no phrase."""
    text, _, ends = spans(ids, tokenizer)
    answer = answer_begins(text)
    return len(ids) if answer is None else int(np.argmax(ends > answer))


def weigh(examples: Sequence[Example], weighting: Weighting) -> list[Example]:
    """Examples with the weights that a `Weighting` gives them; L is the number of tokens with loss.

    `tokens` leaves them as they are; with `questions` those of a question's k paths count 1/k, so that a question with
    many paths counts no more than one with few of that length; with `paths` 1/(k·L), so that long paths count no more
    than short ones.
    """
    if weighting == "tokens":
        return list(examples)
    paths = Counter(example.question_id for example in examples)
    weighed = []
    for example in examples:
        lengths = np.count_nonzero(sum(np.abs(weights) for weights in example.weights.values()))
        if not lengths:
            raise AgentArkError(f"question {example.question_id}: an example without loss has no weight to share.")
        factor = np.float32(1 / paths[example.question_id] / (lengths if weighting == "paths" else 1))
        weighed.append(replace(example, weights={term: factor * value for term, value in example.weights.items()}))
    return weighed
