"""Fixtures shared by the tests. JAX runs on the CPU unless told otherwise."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import pytest
import real_server

from agentark_jax.data.render import PlainFormat
from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems

# The same examples every time: what fails here fails everywhere.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session")
def form(tmp_path_factory) -> PlainFormat:
    """The plain format over a small trained tokenizer."""
    directory = tmp_path_factory.mktemp("tokenizer")
    questions = WordProblems(TaskConfig()).questions("warm_start", 200)
    texts = [text for question in questions for text in (question.prompt, question.rationale)]
    train_tokenizer(texts, 400, directory)
    return PlainFormat(Tokenizer(directory))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Two random models of one shape, with one tokenizer."""
    directory = tmp_path_factory.mktemp("models")
    return [real_server.make_model(directory / f"m{seed}", seed) for seed in range(2)]


@pytest.fixture(scope="session")
def server(models, tmp_path_factory):
    """The URL of a real SGLang server."""
    with real_server.serving(models[0], tmp_path_factory.mktemp("log") / "server.log") as url:
        yield url
