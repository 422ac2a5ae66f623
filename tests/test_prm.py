"""The losses of process reward models: against NumPy, torch and finite differences, and what they reach."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentark_jax.models.config import ModelConfig
from agentark_jax.models.heads import init_head, step_logits
from agentark_jax.models.source import ScratchConfig
from agentark_jax.models.transformer import init_params
from agentark_jax.objectives.config import RELEASE
from agentark_jax.objectives.prm import (
    Steps,
    contrastive,
    cross_entropy,
    init_projector,
    prm_loss,
    prm_loss_from_hidden,
    project,
    supervised_contrastive,
    term_totals,
)

TERMS = ("cross_entropy", "contrastive", "supervised_contrastive")
ROWS, STEPS, SIZE = 4, 5, 6


def some_steps(seed, share=0.7, soft=False) -> Steps:
    """Two questions with two trajectories each, a row each; padding carries labels that must not count."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, STEPS)
    labels = rng.random(shape) if soft else rng.integers(0, 2, shape)
    mask = rng.random(shape) < share
    labels = np.where(mask, labels, 7)
    questions, trajectories = (np.broadcast_to(np.array(each)[:, None], shape) for each in ([3, 3, 8, 8], [0, 1, 0, 2]))
    ends = rng.integers(0, 9, shape)
    return Steps(ends, np.asarray(labels, np.float32), mask, questions, trajectories)


def some_logits(seed):
    return np.random.default_rng(seed + 1).normal(size=(ROWS, STEPS, 2)).astype(np.float32) * 2


def listed(steps: Steps):
    """The steps that are no padding, one by one: (place, label, question, trajectory)."""
    places = [place for place in np.ndindex(ROWS, STEPS) if steps.mask[place]]
    return [(place, float(steps.labels[place]), steps.questions[place], steps.trajectories[place]) for place in places]


def chance(pair):
    return 1 / (1 + np.exp(float(pair[0]) - float(pair[1])))


def reference_cross_entropy(logits, steps):
    """(sum, total), step by step, in float64."""
    terms = [
        -(label * np.log(chance(logits[place])) + (1 - label) * np.log(1 - chance(logits[place])))
        for place, label, _, _ in listed(steps)
    ]
    return sum(terms), len(terms)


def reference_contrastive(logits, steps, temperature):
    loss = total = 0.0
    for place, label, question, trajectory in listed(steps):
        own = np.exp(chance(logits[place]) / temperature)
        rivals = [
            (1 - other_label) * np.exp(chance(logits[other]) / temperature)
            for other, other_label, other_question, other_trajectory in listed(steps)
            if other_question == question and other_trajectory != trajectory and other_label < 1
        ]
        if rivals:
            loss -= label * np.log(own / (own + sum(rivals)))
            total += label
    return loss, total


def reference_supervised(vectors, steps, temperature):
    loss = total = 0.0
    vectors = np.asarray(vectors, np.float64)
    for place, label, _, _ in listed(steps):
        others = [(other, other_label) for other, other_label, _, _ in listed(steps) if other != place]
        alike = [other for other, other_label in others if (other_label >= 0.5) == (label >= 0.5)]
        if alike:
            everything = sum(np.exp(vectors[place] @ vectors[other] / temperature) for other, _ in others)
            pulls = [np.log(np.exp(vectors[place] @ vectors[other] / temperature) / everything) for other in alike]
            loss -= np.mean(pulls)
            total += 1
    return loss, total


def unit(seed):
    vectors = np.random.default_rng(seed).normal(size=(ROWS, STEPS, SIZE))
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def differences(f, x, epsilon=1e-5):
    """The gradient of a float64 function by central differences."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += epsilon
        down[place] -= epsilon
        gradient[place] = (f(up) - f(down)) / (2 * epsilon)
    return gradient


CASES = {
    "cross_entropy": (lambda x, steps: cross_entropy(x, steps), reference_cross_entropy, some_logits),
    "contrastive": (
        lambda x, steps: contrastive(x, steps, 0.3),
        lambda x, steps: reference_contrastive(x, steps, 0.3),
        some_logits,
    ),
    "supervised_contrastive": (
        lambda x, steps: supervised_contrastive(x, steps, 0.3),
        lambda x, steps: reference_supervised(x, steps, 0.3),
        unit,
    ),
}
COMPILED = {term: jax.jit(jax.value_and_grad(case[0])) for term, case in CASES.items()}
TOTALS = jax.jit(term_totals)


@pytest.mark.parametrize("term", TERMS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.sampled_from([0.0, 0.1, 0.3, 1.0]), soft=st.booleans())
def test_sums_and_totals_equal_a_numpy_reference(term, seed, share, soft):
    _, reference, make = CASES[term]
    steps, x = some_steps(seed, share, soft), make(seed)
    expected, total = reference(x, steps)
    value, gradient = COMPILED[term](x.astype(np.float32), steps)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(TOTALS(steps)[term], total, rtol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_equal_finite_differences_of_the_reference(term, soft):
    _, reference, make = CASES[term]
    steps, x = some_steps(5, soft=soft), make(5).astype(np.float64)
    expected = differences(lambda x: reference(x, steps)[0], x)
    _, found = COMPILED[term](x.astype(np.float32), steps)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_is_that_of_torch(soft):
    steps, logits = some_steps(2, soft=soft), some_logits(2)
    rows, labels = torch.tensor(logits.reshape(-1, 2)), torch.tensor(steps.labels.ravel())
    if soft:
        kept = torch.tensor(steps.mask.ravel())
        both = torch.stack([1 - labels, labels], 1)
        expected = torch.nn.functional.cross_entropy(rows[kept], both[kept], reduction="mean")
    else:
        ignoring = torch.where(torch.tensor(steps.mask.ravel()), labels.long(), -100)
        expected = torch.nn.functional.cross_entropy(rows, ignoring, ignore_index=-100)
    np.testing.assert_allclose(cross_entropy(logits, steps) / steps.mask.sum(), float(expected), rtol=1e-5)


@pytest.mark.parametrize("weight", [0.5, 4.0])
def test_wrong_steps_count_by_their_weight_as_torchs_classes_do(weight):
    steps, logits = some_steps(2), some_logits(2)
    ignoring = torch.where(torch.tensor(steps.mask.ravel()), torch.tensor(steps.labels.ravel()).long(), -100)
    rows, classes = torch.tensor(logits.reshape(-1, 2)), torch.tensor([weight, 1.0])
    expected = torch.nn.functional.cross_entropy(rows, ignoring, weight=classes, ignore_index=-100)
    total = term_totals(steps, weight)["cross_entropy"]
    np.testing.assert_allclose(cross_entropy(logits, steps, weight) / total, float(expected), rtol=1e-5)


def test_the_weight_of_wrong_steps_is_that_of_the_loss_and_of_its_accuracy():
    hidden, parts, steps, weight = states(), parameters(), some_steps(3), 3.0
    totals = term_totals(steps, weight)
    settings = {"wrong_weight": weight}
    value, metrics = prm_loss_from_hidden(
        hidden, parts["head"], None, steps, totals, {"cross_entropy": 1.0}, **settings
    )
    logits = step_logits(parts["head"], hidden, steps.ends)
    np.testing.assert_allclose(value, cross_entropy(logits, steps, weight) / totals["cross_entropy"], rtol=1e-6)
    agrees = [
        (logits[place][1] >= logits[place][0], label, 1.0 if label else weight) for place, label, _, _ in listed(steps)
    ]
    expected = sum(w for right, label, w in agrees if right == label) / sum(w for *_, w in agrees)
    np.testing.assert_allclose(metrics["accuracy"], expected, rtol=1e-6)


def test_a_right_step_is_contrasted_with_wrong_steps_of_other_agents_on_its_question_alone():
    # By row: the anchor's agent; its rival; and two agents on another question, all of whose steps are wrong.
    labels, mask = np.zeros((ROWS, STEPS), np.float32), np.zeros((ROWS, STEPS), bool)
    labels[:2, 0] = 1
    mask[:, :2] = True
    steps = some_steps(0)._replace(labels=labels, mask=mask)
    logits = some_logits(0)
    _, gradient = COMPILED["contrastive"](logits, steps)
    assert np.any(gradient, axis=-1).tolist() == [[True, True, False, False, False]] * 2 + [[False] * STEPS] * 2
    assert TOTALS(steps)["contrastive"] == 2
    labels[1, 0] = 0.0
    _, gradient = COMPILED["contrastive"](logits, steps)
    assert np.any(gradient, axis=-1).tolist() == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        *[[False] * STEPS] * 2,
    ]
    # Descending raises the anchor's score and lowers its rivals'.
    assert gradient[0, 0, 1] < 0 < min(gradient[1, :2, 1])
    assert TOTALS(steps)["contrastive"] == 1


def test_one_agents_steps_have_nothing_to_be_contrasted_with():
    steps = some_steps(0, share=1.0)._replace(trajectories=np.zeros((ROWS, STEPS), int))
    assert COMPILED["contrastive"](some_logits(0), steps)[0] == 0
    assert TOTALS(steps)["contrastive"] == 0


def test_low_temperatures_do_not_overflow():
    steps = some_steps(1, share=1.0)
    value, gradient = jax.value_and_grad(lambda x: contrastive(x, steps, 1e-3))(10 * some_logits(1))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def parameters(seed=0):
    """Head and projector, with biases that are not zero."""
    config = ModelConfig.from_hf(ScratchConfig(hidden_size=SIZE).to_hf(vocabulary=300, bos_id=None, eos_id=1), "c.json")
    rng = np.random.default_rng(seed)
    made = {"head": init_head(config, "prm", seed), "projector": init_projector(SIZE, seed)}
    return jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) / 2, made)


@partial(jax.jit, static_argnums=5)
def compiled(hidden, parts, steps, coefficients, totals, differentiated):
    def loss(hidden, parts):
        return prm_loss_from_hidden(hidden, parts["head"], parts["projector"], steps, totals, coefficients)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, parts) if differentiated else loss(hidden, parts)


def loss(hidden, parts, steps, coefficients, totals=None):
    """(loss, metrics)"""
    return compiled(hidden, parts, steps, dict(coefficients), totals or TOTALS(steps), False)


def gradients(hidden, parts, steps, coefficients):
    """((loss, metrics), (gradient of the hidden states, gradients of the parts))"""
    return compiled(hidden, parts, steps, dict(coefficients), TOTALS(steps), True)


def states(seed=0):
    return np.random.default_rng(seed).normal(size=(ROWS, 9, SIZE)).astype(np.float32)


def test_the_release_is_cross_entropy_and_half_the_supervised_contrast_of_projected_states():
    hidden, parts, steps = states(), parameters(), some_steps(3)
    value, metrics = loss(hidden, parts, steps, RELEASE)
    inner = {
        name: {key: np.asarray(leaf, np.float64) for key, leaf in layer.items()}
        for name, layer in parts["projector"].items()
    }
    ends = np.stack([row[ends] for row, ends in zip(hidden, steps.ends, strict=True)]).astype(np.float64)
    middle = np.maximum(ends @ inner["first"]["weight"].T + inner["first"]["bias"], 0)
    outer = middle @ inner["second"]["weight"].T + inner["second"]["bias"]
    outer /= np.linalg.norm(outer, axis=-1, keepdims=True)
    logits = ends @ np.asarray(parts["head"]["weight"], np.float64).T + np.asarray(parts["head"]["bias"])
    contrast, anchors = reference_supervised(outer, steps, 0.1)
    entropy, labelled = reference_cross_entropy(logits, steps)
    np.testing.assert_allclose(value, entropy / labelled + 0.5 * contrast / anchors, rtol=1e-5)
    np.testing.assert_allclose(metrics["supervised_contrastive"], contrast / anchors, rtol=1e-5)
    right = [(logits[place][1] >= logits[place][0]) == (label >= 0.5) for place, label, _, _ in listed(steps)]
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)
    assert metrics["steps"] == labelled


def reached(coefficients):
    """Which leaves have a gradient: those of head and projector, and the hidden states."""
    steps = some_steps(3)
    _, of = gradients(states(), parameters(), steps, coefficients)
    return {jax.tree_util.keystr(path): bool(np.any(leaf)) for path, leaf in jax.tree.leaves_with_path(of)}


def test_every_term_reaches_what_it_should_train():
    head = {"[1]['head']['weight']", "[1]['head']['bias']"}
    projector = {
        f"[1]['projector']['{layer}']['{part}']" for layer in ("first", "second") for part in ("weight", "bias")
    }
    reaches = {"cross_entropy": head, "contrastive": head, "supervised_contrastive": projector}
    for term, expected in reaches.items():
        found = {name for name, is_reached in reached({**dict.fromkeys(TERMS, 0.0), term: 1.0}).items() if is_reached}
        assert found == expected | {"[0]"}
    assert all(reached(RELEASE).values())


def test_training_the_projector_changes_it_and_lowers_the_contrast():
    hidden, parts, steps = states(), parameters(), some_steps(3)
    (value, _), (_, gradient) = gradients(hidden, parts, steps, RELEASE)
    after = jax.tree.map(lambda leaf, slope: leaf - 0.02 * slope, parts, gradient)
    assert loss(hidden, {**parts, "projector": after["projector"]}, steps, RELEASE)[0] < value


def test_micro_batches_add_up_where_questions_stay_whole():
    hidden, parts, steps = states(), parameters(), some_steps(3, soft=True)
    coefficients = {"cross_entropy": 1.0, "contrastive": 2.0}
    totals = TOTALS(steps)
    whole, metrics = loss(hidden, parts, steps, coefficients, totals)
    halves = [
        loss(hidden[rows], parts, Steps(*(each[rows] for each in steps)), coefficients, totals)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(sum(value for value, _ in halves), whole, rtol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(sum(part[name] for _, part in halves), metrics[name], rtol=1e-5)


def test_padding_reaches_nothing_and_empty_batches_are_zero():
    parts, steps = parameters(), some_steps(3)
    every = dict.fromkeys(TERMS, 1.0)
    logits, vectors = some_logits(0), unit(0).astype(np.float32)
    spoiled = np.where(steps.mask[..., None], logits, 1e4)
    for term in ("cross_entropy", "contrastive"):
        assert COMPILED[term](logits, steps)[0] == COMPILED[term](spoiled, steps)[0]
    spoiled = np.where(steps.mask[..., None], vectors, np.float32(3))
    supervised = COMPILED["supervised_contrastive"]
    assert supervised(vectors, steps)[0] == supervised(spoiled, steps)[0]
    empty = steps._replace(mask=np.zeros((ROWS, STEPS), bool))
    (value, metrics), of = gradients(states(), parts, empty, every)
    assert value == 0
    assert all(metric == 0 for metric in metrics.values())
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of))


def test_dead_projections_have_no_nan():
    parts = jax.tree.map(jnp.zeros_like, parameters())
    (value, _), of = gradients(states(), parts, some_steps(3), RELEASE)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of))
    assert np.linalg.norm(project(parameters()["projector"], states()[0, 0])) == pytest.approx(1, rel=1e-5)


def test_a_contrast_of_vectors_needs_a_projector():
    steps = some_steps(3)
    with pytest.raises(ValueError, match="init_projector"):
        prm_loss_from_hidden(states(), parameters()["head"], None, steps, term_totals(steps), RELEASE)


def test_half_precision_states_are_scored_in_float32():
    value, metrics = loss(jnp.asarray(states(), jnp.bfloat16), parameters(), some_steps(3), RELEASE)
    assert value.dtype == jnp.float32
    assert metrics["accuracy"].dtype == jnp.float32


def test_the_loss_reaches_the_whole_network():
    tiny = ScratchConfig(hidden_size=8, layers=1, heads=2, kv_heads=1, head_dim=4, intermediate_size=8)
    config = ModelConfig.from_hf(tiny.to_hf(vocabulary=40, bos_id=None, eos_id=1), "c")
    params = init_params(config, 0)
    parts = {"head": init_head(config, "prm", 0), "projector": init_projector(config.hidden_size, 0)}
    rng = np.random.default_rng(0)
    steps = some_steps(3)
    batch = {
        "ids": rng.integers(0, 40, (ROWS, 9)),
        "positions": np.tile(np.arange(9), (ROWS, 1)),
        "segment_ids": np.ones((ROWS, 9), int),
        "steps": steps,
    }

    @jax.jit
    @jax.grad
    def gradient(trained):
        params, parts = trained
        coefficients = {**RELEASE, "contrastive": 1.0}
        return prm_loss(config, params, parts["head"], parts["projector"], batch, term_totals(steps), coefficients)[0]

    found = jax.tree.leaves_with_path(gradient((params, parts)))
    still = [jax.tree_util.keystr(path) for path, leaf in found if not np.any(leaf)]
    assert still == []
