"""Fixtures shared by the tests. JAX runs on the CPU unless told otherwise."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

from agentark_jax.data.render import PlainFormat
from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems


@pytest.fixture(scope="session")
def form(tmp_path_factory) -> PlainFormat:
    """The plain format over a small trained tokenizer."""
    directory = tmp_path_factory.mktemp("tokenizer")
    questions = WordProblems(TaskConfig()).questions("warm_start", 200)
    texts = [text for question in questions for text in (question.prompt, question.rationale)]
    train_tokenizer(texts, 400, directory)
    return PlainFormat(Tokenizer(directory))
