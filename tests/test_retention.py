"""What is kept of the base: divergences against NumPy, which tokens are reasoning, and figures made by hand."""

import jax
import numpy as np
import pytest
from tiny_models import our_logits, write_model

from agentark_jax.evaluation.retention import Tokens, reasoning_spans, retention_figures, span_states
from agentark_jax.models.config import load_config
from agentark_jax.models.transformer import unembedding
from agentark_jax.models.weights import load_params
from agentark_jax.objectives.divergence import Readout, divergences
from agentark_jax.records import Question

WAY = "Tom has 4 apples. He buys 3 more. So he has 4 + 3 = 7 apples."


def question(number: int, rationale: str) -> Question:
    return Question.make("t", "held_out", f"Tom has {number} apples. How many?", "7", rationale)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def numpy_divergences(logits: list[np.ndarray], targets: np.ndarray) -> list[np.ndarray]:
    p, q = map(log_softmax, logits)
    place = np.arange(len(targets))
    return [
        p[place, targets],
        q[place, targets],
        (np.exp(p) * (p - q)).sum(-1),
        (np.exp(q) * (q - p)).sum(-1),
    ]


@pytest.mark.parametrize("caps", [(None, None), (3.0, None)])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 50 * 3, 2**28])
def test_divergences_equal_those_of_numpy_however_they_are_chunked(caps, chunk_bytes):
    draws = np.random.default_rng(0)
    hidden = draws.normal(size=(11, 8)).astype(np.float32), draws.normal(size=(11, 5)).astype(np.float32)
    heads = draws.normal(size=(50, 8)).astype(np.float32), draws.normal(size=(50, 5)).astype(np.float32)
    targets = draws.integers(0, 50, 11)
    readouts = tuple(Readout(head, cap) for head, cap in zip(heads, caps, strict=True))
    found = divergences(hidden, readouts, targets, chunk_bytes=chunk_bytes)
    logits = [h @ head.T for h, head in zip(hidden, heads, strict=True)]
    logits = [x if cap is None else cap * np.tanh(x / cap) for x, cap in zip(logits, caps, strict=True)]
    for ours, theirs in zip(found, numpy_divergences(logits, targets), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_model_does_not_differ_from_itself_and_no_divergence_is_negative():
    draws = np.random.default_rng(1)
    hidden, head = draws.normal(size=(40, 8)).astype(np.float32), 3 * draws.normal(size=(300, 8)).astype(np.float32)
    targets = np.zeros(40, np.int32)
    same = divergences((hidden, hidden), (Readout(head, None), Readout(head, None)), targets)
    np.testing.assert_array_equal(same.forward, 0)
    np.testing.assert_array_equal(same.reverse, 0)
    near = divergences((hidden, hidden), (Readout(head, None), Readout(head * np.float32(1.00001), None)), targets)
    assert np.all(np.asarray(near.forward) >= 0)
    assert np.all(np.asarray(near.reverse) >= 0)


def test_vocabularies_of_two_sizes_are_refused():
    heads = [Readout(np.zeros((size, 4), np.float32), None) for size in (7, 8)]
    with pytest.raises(ValueError, match="7 tokens, the other 8"):
        divergences((np.zeros((1, 4)), np.zeros((1, 4))), tuple(heads), np.zeros(1, np.int32))


def test_reasoning_is_neither_question_nor_answer_nor_end(form):
    (span,) = reasoning_spans([question(4, f"{WAY} The answer is 7.")], form)
    assert form.tokenizer.decode(span.targets.tolist()).strip() == WAY
    (open_ended,) = reasoning_spans([question(4, WAY)], form)
    assert form.tokenizer.decode(open_ended.targets.tolist()).strip() == WAY
    assert form.tokenizer.eos_id not in open_ended.targets
    # What the format puts before every answer is not reasoning.
    assert form.tokenizer.decode(span.targets[:1].tolist()) == "T"


def test_rationales_without_a_reason_are_left_out(form):
    assert reasoning_spans([question(4, "The answer is 7."), question(5, "")], form) == []


@pytest.fixture(scope="module")
def two_models(form, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_model(directory, form.tokenizer.vocabulary_size)
    config = load_config(directory)
    params = load_params(directory, config)
    return [(config, params), (config, jax.tree.map(lambda leaf: leaf * 0.9, params))]


def test_two_models_are_compared_at_the_right_tokens(form, two_models):
    asked = [question(4, f"{WAY} The answer is 7."), question(5, "5 and 2 are 7. The answer is 7.")]
    spans = reasoning_spans(asked, form)
    states = [span_states(config, params, spans, tokens=64) for config, params in two_models]
    readouts = [Readout(unembedding(config, params), config.final_softcap) for config, params in two_models]
    targets = np.concatenate([span.targets for span in spans])
    found = divergences(tuple(states), tuple(readouts), targets)
    logits = []
    for config, params in two_models:
        rows = [our_logits(config, params, span.ids[None])[0] for span in spans]
        logits.append(
            np.concatenate([row[np.flatnonzero(span.reasoning) - 1] for row, span in zip(rows, spans, strict=True)])
        )
    for ours, theirs in zip(found, numpy_divergences(logits, targets), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


def test_figures_by_sample_and_by_token():
    # Two samples: of three tokens, and of one.
    found = Tokens(
        np.asarray([0, 0, 0, 1]),
        base=np.asarray([1.0, 2.0, 3.0, 4.0]),
        model=np.asarray([1.0, 1.0, 1.0, 2.0]),
        forward=np.asarray([0.0, 0.3, 0.6, 0.1]),
        reverse=np.zeros(4),
    )
    figures = retention_figures(found, ["a", "b"])
    assert (figures["n"], figures["questions"], figures["tokens"]) == (2, 2, 4)
    sample, token = figures["by_sample"], figures["by_token"]
    assert sample["nll"]["base"]["value"] == pytest.approx((2 + 4) / 2)
    assert sample["nll"]["difference"]["value"] == pytest.approx((-1 - 2) / 2)
    assert sample["perplexity"]["base"]["value"] == pytest.approx((np.exp(2) + np.exp(4)) / 2)
    assert sample["forward_kl"]["value"] == pytest.approx((0.3 + 0.1) / 2)
    assert token["nll"]["base"]["value"] == pytest.approx(10 / 4)
    assert token["nll"]["difference"]["value"] == pytest.approx(-5 / 4)
    assert token["perplexity"]["model"]["value"] == pytest.approx(np.exp(5 / 4))
    assert token["perplexity"]["difference"]["value"] == pytest.approx(np.exp(5 / 4) - np.exp(10 / 4))
    assert token["forward_kl"]["value"] == pytest.approx(1.0 / 4)
    # All resamples say zero, so the spread is not known.
    assert token["reverse_kl"] == {"value": 0.0, "low": None, "high": None}
    assert sample["nll"]["base"]["low"] == pytest.approx(2)
    assert sample["nll"]["base"]["high"] == pytest.approx(4)
