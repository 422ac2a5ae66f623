"""What both sides work on, made without JAX and without torch."""

from pathlib import Path

import numpy as np

from agentark_jax.data.render import PlainFormat
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems

SHORTEST, LONGEST = 48, 80


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
