"""The losses: against dense log-softmax, an independent NumPy reference and finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentark_jax.models.sharding import MESH_AXES
from agentark_jax.objectives import chunked
from agentark_jax.objectives.chunked import Portions, chunk_rows, chunked_logprobs, chunked_nll, portions
from agentark_jax.objectives.sft import sft_loss_from_hidden, term_totals, term_weights


def dense_nll(hidden, head, targets, soft_cap):
    logits = hidden @ head.T
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]


def problem(seed, tokens, vocabulary, size, share):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(tokens, size)), jnp.float32),
        jnp.asarray(rng.normal(size=(vocabulary, size)), jnp.float32),
        jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32),
        jnp.asarray(rng.normal(size=tokens), jnp.float32),
        jnp.asarray(rng.random(tokens) < share),
    )


def assert_close(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * max(1e-3, np.abs(expected).max(initial=0.0)))


@partial(jax.jit, static_argnames=("chunk", "soft_cap"))
def both(hidden, head, targets, coefficients, mask, chunk, soft_cap):
    """(value, nll, gradients) chunked and dense; then the chunked gradients asked for one at a time."""

    def chunked(hidden, head):
        chunk_bytes = chunk * head.shape[0] * 4
        total, scores = chunked_nll(
            hidden, head, targets, coefficients, mask, soft_cap=soft_cap, chunk_bytes=chunk_bytes
        )
        return 3.0 * total, -scores.logprobs

    def dense(hidden, head):
        nll = jnp.where(mask, dense_nll(hidden, head, targets, soft_cap), 0.0)
        return 3.0 * jnp.sum(coefficients * nll), nll

    alone = tuple(jax.grad(chunked, index, has_aux=True)(hidden, head)[0] for index in (0, 1))
    ours, reference = (jax.value_and_grad(f, (0, 1), has_aux=True)(hidden, head) for f in (chunked, dense))
    return ours, reference, alone, chunked(hidden, head)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    case=st.sampled_from([(1, 1, None), (12, 5, 3.0), (13, 13, None), (12, 1, None)]),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_chunked_equals_dense_in_values_and_gradients(seed, case, share):
    tokens, chunk, soft_cap = case
    given = problem(seed, tokens, 17, 6, share)
    ours, reference, alone, undifferentiated = both(*given, chunk=chunk, soft_cap=soft_cap)
    total, nll = reference[0]
    terms = float(
        jnp.abs(3.0 * given[3] * nll).sum()
    )  # they have both signs, and their sum the rounding of the largest
    for value in (ours[0][0], undifferentiated[0]):
        np.testing.assert_allclose(value, total, rtol=0, atol=1e-6 * max(1.0, terms))
    for scores in (ours[0][1], undifferentiated[1]):
        assert_close(scores, nll)
    jax.tree.map(assert_close, ours[1], reference[1])
    jax.tree.map(assert_close, alone, reference[1])


def test_per_token_nll_carries_no_gradient():
    hidden, head, targets, coefficients, mask = problem(0, 5, 7, 3, 1.0)
    gradient = jax.grad(lambda h: chunked_nll(h, head, targets, coefficients, mask)[1].logprobs.sum())(hidden)
    assert not np.any(np.asarray(gradient))


def matmuls(closed):
    """(dot products, their largest operand counts) of a jaxpr, those inside of loops and calls included."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(max(variable.aval.size for variable in equation.outvars))
            for parameter in equation.params.values():
                for inner in parameter if isinstance(parameter, tuple | list) else (parameter,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        visit(inner)

    visit(closed.jaxpr)
    return found


def test_a_frozen_head_costs_two_matrix_products_and_a_trained_one_three_and_no_dense_logits_exist():
    hidden, head, targets, coefficients, mask = problem(0, 64, 50, 4, 0.5)

    def loss(hidden, head):
        return chunked_nll(hidden, head, targets, coefficients, mask, chunk_bytes=8 * 50 * 4)[0]

    def recomputed(hidden, head):
        return chunked_logprobs(hidden, head, targets, mask, chunk_bytes=8 * 50 * 4).logprobs.sum()

    assert len(matmuls(jax.make_jaxpr(jax.grad(recomputed, 0))(hidden, head))) == 3
    assert len(matmuls(jax.make_jaxpr(jax.grad(recomputed, (0, 1)))(hidden, head))) == 4
    frozen = matmuls(jax.make_jaxpr(jax.grad(loss, 0))(hidden, head))
    trained = matmuls(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, head))
    forward = matmuls(jax.make_jaxpr(loss)(hidden, head))
    assert (len(forward), len(frozen), len(trained)) == (1, 2, 3)
    assert max(trained) < 64 * 50


@pytest.mark.parametrize("chunk", [1, 3, 12])
def test_tokens_without_loss_are_never_multiplied_with_the_head(chunk):
    # A NaN in a hidden state that has no loss would reach everything that its chunk is summed into.
    hidden, head, targets, coefficients, _ = problem(0, 12, 9, 4, 1.0)
    mask = jnp.arange(12) % 3 == 0
    poisoned = jnp.where(mask[:, None], hidden, jnp.nan)
    chunk_bytes = chunk * 9 * 4

    def fused(hidden, head):
        return chunked_nll(hidden, head, targets, coefficients, mask, chunk_bytes=chunk_bytes)

    def recomputed(hidden, head):
        scores = chunked_logprobs(hidden, head, targets, mask, entropy=True, chunk_bytes=chunk_bytes)
        return jnp.sum(coefficients * scores.logprobs + scores.entropy), scores

    for loss in (fused, recomputed):
        found = jax.value_and_grad(loss, (0, 1), has_aux=True)(poisoned, head)
        jax.tree.map(assert_close, found, jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head))
        scores, (of_hidden, _) = found[0][1], found[1]
        for outside in (scores.logprobs, scores.correct, of_hidden):
            assert not np.any(np.asarray(outside)[~np.asarray(mask)])


def reference_scores(hidden, head, targets, temperature, soft_cap):
    """(log-probabilities, entropies, correct), token by token, in float64."""
    logprobs, entropies, correct = [], [], []
    for state, target in zip(np.asarray(hidden, np.float64), np.asarray(targets), strict=True):
        logits = np.asarray(head, np.float64) @ state
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        probabilities = np.exp(logits / temperature)
        probabilities /= probabilities.sum()
        logprobs.append(np.log(probabilities[target]))
        entropies.append(-np.sum(probabilities * np.log(probabilities)))
        correct.append(np.argmax(logits) == target)
    return np.asarray(logprobs), np.asarray(entropies), np.asarray(correct)


@pytest.mark.parametrize("chunk", [1, 5, 12])
@pytest.mark.parametrize(("temperature", "soft_cap"), [(1.0, None), (0.7, 3.0), (1.3, None)])
def test_logprobs_and_entropies_equal_a_numpy_reference_and_finite_differences(temperature, soft_cap, chunk):
    hidden, head, targets, coefficients, mask = problem(3, 12, 9, 4, 0.7)
    targets = targets.at[::2].set(jnp.argmax(hidden @ head.T, axis=1)[::2])
    inside, coefficients = np.asarray(mask), np.asarray(coefficients, np.float64)

    def objective(logprobs, entropies):  # not linear, as ratios and bonuses are
        return (coefficients * logprobs**2 + 0.3 * entropies)[inside].sum()

    def ours(hidden, head):
        settings = {"temperature": temperature, "soft_cap": soft_cap, "chunk_bytes": chunk * 9 * 4}
        scores = chunked_logprobs(hidden, head, targets, mask, entropy=True, **settings)
        return objective(scores.logprobs, scores.entropy), scores

    (_, scores), gradients = jax.value_and_grad(ours, (0, 1), has_aux=True)(hidden, head)
    logprobs, entropies, correct = reference_scores(hidden, head, targets, temperature, soft_cap)
    assert_close(scores.logprobs, np.where(inside, logprobs, 0))
    assert_close(scores.entropy, np.where(inside, entropies, 0))
    np.testing.assert_array_equal(scores.correct, inside & correct)
    assert 0 < np.sum(scores.correct) < inside.sum()
    # Asked for one at a time: what is not asked for is not computed, and the rest stays the same.
    for index in (0, 1):
        assert_close(jax.grad(ours, index, has_aux=True)(hidden, head)[0], gradients[index])
    assert chunked_logprobs(hidden, head, targets, mask).entropy is None

    random, step = np.random.default_rng(0), 1e-6
    for index, gradient in enumerate(gradients):
        direction = random.normal(size=gradient.shape)
        sides = []
        for sign in (1, -1):
            moved = [np.asarray(array, np.float64) for array in (hidden, head)]
            moved[index] += sign * step * direction
            sides.append(objective(*reference_scores(*moved, targets, temperature, soft_cap)[:2]))
        slope = (float(sides[0]) - float(sides[1])) / (2 * step)
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of", ["logprobs", "entropy"])
def test_gradients_of_logprobs_or_entropies_alone_equal_the_dense_ones(of):
    hidden, head, targets, coefficients, mask = problem(4, 12, 17, 6, 0.6)

    def ours(hidden, head):
        scores = chunked_logprobs(hidden, head, targets, mask, temperature=0.8, entropy=True, chunk_bytes=5 * 17 * 4)
        return jnp.sum(coefficients * getattr(scores, of))

    def dense(hidden, head):
        logprobs = jax.nn.log_softmax(hidden @ head.T / 0.8)
        chosen = jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]
        value = {"logprobs": chosen, "entropy": -jnp.sum(jnp.exp(logprobs) * logprobs, axis=1)}[of]
        return jnp.sum(jnp.where(mask, coefficients * value, 0.0))

    jax.tree.map(assert_close, jax.grad(ours, (0, 1))(hidden, head), jax.grad(dense, (0, 1))(hidden, head))


def test_chunk_rows():
    assert chunk_rows(1024, 262_144, 2**27) == 128
    assert chunk_rows(10, 100, 2**27) == 10
    assert chunk_rows(1024, 262_144, 1) == 1
    assert chunk_rows(16_380, 151_936, 2**28) == 384  # 441 would fit
    assert chunk_rows(200, 1000, 2**28) == 200  # all there are
    assert chunk_rows(1024, 1000, 4 * 1000 * 100) == 100


@pytest.mark.parametrize("parts", [1, 16])
def test_the_parts_that_logits_are_made_in_change_nothing(parts, monkeypatch):
    monkeypatch.setattr(chunked, "portions", lambda platform: Portions(8 * 48 * 4, parts))
    arguments = problem(0, 23, 48, 6, 0.6)

    def loss(hidden, head):
        return chunked_nll(hidden, head, *arguments[2:])[0]

    def dense(hidden, head):
        targets, coefficients, mask = arguments[2:]
        return jnp.sum(jnp.where(mask, coefficients * dense_nll(hidden, head, targets, None), 0.0))

    assert max(matmuls(jax.make_jaxpr(loss)(*arguments[:2]))) == 8 * 48 // parts
    jax.tree.map(assert_close, *(jax.jit(jax.grad(f, (0, 1)))(*arguments[:2]) for f in (loss, dense)))


@pytest.mark.parametrize(
    ("platform", "products"), [("gpu", [1024 * 160]), ("cpu", [1024 * 10, 512 * 10]), ("tpu", [1024 * 10])]
)
def test_the_devices_of_the_mesh_decide_about_the_portions(platform, products):
    device = jax.sharding.AbstractDevice(device_kind="some kind", num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh((1, 1, 1), MESH_AXES, abstract_device=device)
    arguments = problem(0, 1024, 160, 4, 0.5)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(lambda *given: chunked_nll(*given)[0])(*arguments)
    assert matmuls(traced) == products


@pytest.mark.parametrize("masked", [3, 130, 250, 256, 300, 390])
def test_a_last_chunk_of_half_the_rows_changes_nothing(masked, monkeypatch):
    """Whole chunks of 256 rows; what is left of 3, 130 and 44 tokens, or nothing."""
    random = np.random.default_rng(masked)
    hidden, head = (jnp.asarray(random.normal(size=size), jnp.float32) for size in ((400, 6), (12, 6)))
    targets, coefficients = jnp.asarray(random.integers(0, 12, 400)), jnp.asarray(random.random(400), jnp.float32)
    mask = jnp.asarray(random.permutation(np.arange(400) < masked))

    def loss(hidden, head):
        return chunked_nll(hidden, head, targets, coefficients, mask)[0]

    found = {}
    for halves in (False, True):
        monkeypatch.setattr(chunked, "portions", lambda platform, halves=halves: Portions(256 * 12 * 4, 4, halves))
        found[halves] = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, head)
        jax.clear_caches()
    jax.tree.map(assert_close, found[True], found[False])


def test_on_gpus_the_head_is_multiplied_in_one_piece_and_in_large_chunks():
    assert portions("gpu").parts == 1
    assert portions("gpu").chunk_bytes > portions("tpu").chunk_bytes
    assert portions("cpu") == portions("tpu")._replace(halves=True)
    assert portions("tpu") == portions(None)


def two_term_batch(rng, batch=2, length=9, vocabulary=11):
    segment_ids = np.array([[1] * 4 + [2] * 3 + [0] * 2, [1] * 9])[:batch, :length]
    weights = {
        "answer": (rng.random((batch, length)) < 0.4).astype(np.float32),
        "rationale": rng.random((batch, length)).astype(np.float32),
    }
    ids = rng.integers(0, vocabulary, (batch, length)).astype(np.int32)
    return {
        "ids": ids,
        "positions": np.zeros_like(ids),
        "segment_ids": segment_ids.astype(np.int32),
        "weights": weights,
    }


def reference_loss(hidden, head, batch, coefficients):
    """Token by token, in float64."""
    sums, totals, right = (dict.fromkeys(coefficients, 0.0) for _ in range(3))
    for row, segments in enumerate(batch["segment_ids"]):
        for t in range(1, len(segments)):
            if segments[t] == 0 or segments[t] != segments[t - 1]:
                continue
            logits = np.asarray(head, np.float64) @ np.asarray(hidden[row, t - 1], np.float64)
            nll = np.log(np.exp(logits).sum()) - logits[batch["ids"][row, t]]
            for term in coefficients:
                sums[term] += float(batch["weights"][term][row, t]) * nll
                totals[term] += float(batch["weights"][term][row, t])
                right[term] += float(batch["weights"][term][row, t]) * (np.argmax(logits) == batch["ids"][row, t])
    return sum(coefficients[term] * sums[term] / totals[term] for term in coefficients), sums, totals, right


def test_sft_loss_equals_a_numpy_reference_and_finite_differences():
    rng = np.random.default_rng(1)
    batch = two_term_batch(rng)
    coefficients = {"answer": 2.0, "rationale": 0.5}
    hidden = rng.normal(size=(2, 9, 5)).astype(np.float32)
    head = rng.normal(size=(11, 5)).astype(np.float32)
    batch["ids"][:, 1::2] = np.argmax(hidden @ head.T, axis=-1)[:, :-1:2]  # every other prediction is right

    def loss(hidden, head):
        return sft_loss_from_hidden(hidden, head, batch, term_totals(batch), coefficients, chunk_bytes=3 * 11 * 4)

    (value, metrics), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(jnp.asarray(hidden), jnp.asarray(head))
    expected, sums, totals, right = reference_loss(hidden, head, batch, coefficients)
    assert right["answer"] > 0
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    for term in coefficients:
        np.testing.assert_allclose(metrics[f"nll/{term}"], sums[term] / totals[term], rtol=1e-5)
        np.testing.assert_allclose(metrics[f"accuracy/{term}"], right[term] / totals[term], rtol=1e-5)
    assert metrics["tokens"] == 16
    assert metrics["loss_tokens"] == 13

    step = 1e-5
    for argument, gradient in zip((hidden, head), gradients, strict=True):
        direction = rng.normal(size=argument.shape)
        sides = []
        for sign in (1, -1):
            moved = [np.asarray(x, np.float64) for x in (hidden, head)]
            moved[0 if argument is hidden else 1] += sign * step * direction
            sides.append(reference_loss(*moved, batch, coefficients)[0])
        slope = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=1e-4, atol=1e-6)


def test_the_first_token_of_a_segment_and_padding_are_never_predicted():
    batch = two_term_batch(np.random.default_rng(2))
    for weights in batch["weights"].values():
        weights[:] = 1.0
    used = np.asarray(term_weights(batch)["answer"])
    np.testing.assert_array_equal(used, [[1, 1, 1, 0, 1, 1, 0, 0], [1] * 8])
    assert float(term_totals(batch)["answer"]) == 13


def test_a_term_without_weight_in_the_step_contributes_zero():
    rng = np.random.default_rng(3)
    batch = two_term_batch(rng)
    batch["weights"]["answer"][:] = 0
    hidden, head = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 9, 5), (11, 5)))
    coefficients = {"answer": 1.0, "rationale": 1.0}
    gradient, metrics = jax.grad(
        lambda h: sft_loss_from_hidden(h, head, batch, term_totals(batch), coefficients), has_aux=True
    )(hidden)
    assert float(metrics["nll/answer"]) == 0.0
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_large_logits_stay_finite(scale):
    hidden, head, targets, coefficients, mask = problem(5, 6, 8, 4, 1.0)
    total, scores = chunked_nll(scale * hidden, scale * head, targets, coefficients, mask)
    assert np.isfinite(total)
    assert np.all(np.asarray(scores.logprobs) <= 1e-3)
