"""What both sides work on, made without JAX and without torch."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from agentark_jax.data.render import PlainFormat
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems

SHORTEST, LONGEST = 48, 80


def sft_ids(vocabulary: int, batch: int, length: int, repetition: int) -> Int[np.ndarray, "B T"]:
    """Random token ids of one step; the cost of a step does not depend on what they say."""
    return np.random.default_rng(repetition).integers(0, vocabulary, (batch, length), dtype=np.int32)


def first_loss_position(length: int) -> int:
    """The first half of every row is a prompt without loss; all of the second half is predicted."""
    return length // 2


def prompts(model: Path, count: int) -> list[list[int]]:
    """Few-shot word problems as token ids, each ending with an open question; 48 to 80 tokens, 64 on average.

    They are cut on the left to their length, the beginning-of-sequence token (where the model has one) put before.
    """
    tokenizer = Tokenizer(model)
    questions = WordProblems(TaskConfig()).questions("held_out", count + 4)
    beginning = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    result = []
    for index, length in enumerate(np.linspace(SHORTEST, LONGEST, count).astype(int)):
        solved = [
            f"{PlainFormat.QUESTION.format(question=question.prompt)}{PlainFormat.ANSWER} {question.rationale}\n"
            for question in questions[index + 1 : index + 5]
        ]
        text = "".join(solved) + PlainFormat.QUESTION.format(question=questions[index].prompt) + PlainFormat.ANSWER
        ids = list(tokenizer.encode(text))
        result.append(beginning + ids[len(beginning) - int(length) :])
    return result


# Completion tokens (Gemma 3's) of 64 answers of agents in published debates: gpt-4o-mini on MedMCQA, drawn unseen from
# xk-huang/medagents-benchmark.
_ANSWER_TOKENS = (
    *(484, 315, 396, 451, 322, 358, 334, 310, 419, 333, 402, 344, 335, 386, 393, 387, 393, 299, 547, 437, 310, 425),
    *(418, 348, 496, 300, 432, 355, 298, 435, 228, 395, 471, 583, 378, 344, 397, 358, 493, 334, 378, 380, 427, 382),
    *(356, 524, 350, 380, 314, 467, 358, 411, 419, 313, 291, 309, 394, 329, 474, 431, 439, 294, 343, 424),
)


def completion_tokens(count: int, longest: int) -> list[int]:
    """New tokens of so many answers, spread as those of real debates, the longest of all having `longest`."""
    drawn = [_ANSWER_TOKENS[index % len(_ANSWER_TOKENS)] for index in range(count)]
    return [max(1, round(longest * tokens / max(drawn))) for tokens in drawn]
