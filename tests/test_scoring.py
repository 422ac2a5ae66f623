"""Steps scored in batches: equal to the head on each sequence by itself, in few compiled programs."""

import jax
import numpy as np
import pytest
from prm_models import TASK, planted, spoiled, student, turn_of

from agentark_jax.data.render import PlainFormat, step_example
from agentark_jax.data.steps import coverage, cuts, steps
from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.errors import AgentArkError
from agentark_jax.models.heads import init_head, position_logits, step_logits
from agentark_jax.models.transformer import hidden_states
from agentark_jax.models.weights import load_params
from agentark_jax.training.config import MeshConfig
from agentark_jax.training.mesh import make_mesh
from agentark_jax.training.scoring import _scorer, batch_rows, score_steps


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return student(tmp_path_factory.mktemp("scored") / "student")


@pytest.fixture(scope="module")
def scorer(tiny):
    """(what `score_steps` is given first, and the mesh)."""
    head = init_head(tiny.config, "prm", 5)
    head = {"weight": head["weight"] * 30, "bias": np.array([0.2, -0.1], np.float32)}
    params = jax.tree.map(lambda leaf: leaf / 5, load_params(tiny.directory, tiny.config))
    return tiny.config, params, head


MESH = make_mesh(MeshConfig())


def sequences(lengths, vocabulary, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(4, vocabulary, length), np.sort(rng.choice(length, min(length, 1 + length // 7), replace=False)))
        for length in lengths
    ]


def directly(scorer, ids, ends):
    """p(right) of one sequence, without padding."""
    config, params, head = scorer
    h = hidden_states(config, params, np.asarray(ids)[None], np.arange(len(ids), dtype=np.int32)[None])
    return np.asarray(jax.nn.softmax(step_logits(head, h, np.asarray(ends)[None]))[0, :, 1])


def test_scores_are_those_of_the_head_at_the_ends_of_steps_in_the_given_order(scorer):
    given = sequences([70, 3, 33, 129, 1], scorer[0].vocab_size)
    done = []
    found = score_steps(*scorer, given, MESH, tokens=256, progress=done.append)
    assert sum(done) == len(given)
    for (ids, ends), scores in zip(given, found, strict=True):
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, directly(scorer, ids, ends), rtol=1e-5, atol=1e-6)
    assert np.ptp(np.concatenate(found)) > 0.2, "or nothing was told apart"


def test_scores_do_not_depend_on_what_is_scored_beside_them(scorer):
    given = sequences([20, 50, 100, 31], scorer[0].vocab_size)
    together = score_steps(*scorer, given, MESH)
    for sequence, scores in zip(given, together, strict=True):
        np.testing.assert_allclose(score_steps(*scorer, [sequence], MESH)[0], scores, rtol=1e-5, atol=1e-6)


def test_programs_are_compiled_once_a_length(scorer):
    _scorer.cache_clear()
    for seed in range(3):
        score_steps(*scorer, sequences([33, 40, 64, 5, 50 + seed, 100], scorer[0].vocab_size, seed), MESH, tokens=128)
    assert _scorer.cache_info().currsize == 3  # 128, 64, 32
    assert {_scorer(scorer[0], MESH, length, "float32")._cache_size() for length in (64, 128)} == {1}
    assert [batch_rows(length, 8192, MESH) for length in (32, 100, 4096, 8192, 9000)] == [256, 64, 2, 1, 1]


def test_half_precision_is_near(scorer):
    given = sequences([60, 20], scorer[0].vocab_size)
    exact, rough = (np.concatenate(score_steps(*scorer, given, MESH, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert np.any(exact != rough)
    np.testing.assert_allclose(rough, exact, atol=0.1)


def test_nothing_is_scored_as_nothing(scorer):
    assert score_steps(*scorer, [], MESH) == []
    (found,) = score_steps(*scorer, [(np.arange(4, 9), [])], MESH)
    assert found.shape == (0,)


@pytest.mark.parametrize(
    ("ids", "ends", "message"),
    [
        (range(4, 4 + 257), [3], "sequence 1 has 257 tokens; this model scores 1 to 256"),
        ([], [], "sequence 1 has 0 tokens"),
        ([4, 5], [2], r"sequence 1 has 2 tokens and steps that end at \[2\]"),
        ([4, 5], [-1, 1], "steps that end at"),
    ],
)
def test_sequences_that_cannot_be_scored(scorer, ids, ends, message):
    with pytest.raises(AgentArkError, match=message):
        score_steps(*scorer, [([4, 5], [1]), (list(ids), ends)], MESH)


def test_logits_of_every_position_are_those_of_steps(scorer):
    h = np.random.default_rng(0).normal(size=(2, 5, scorer[0].hidden_size)).astype(np.float32)
    everywhere = np.broadcast_to(np.arange(5), (2, 5))
    np.testing.assert_allclose(position_logits(scorer[2], h), step_logits(scorer[2], h, everywhere), rtol=1e-6)


# Examples with steps


QUESTION = TASK.questions("debate", 2)[1]  # of three steps


def test_a_turn_becomes_an_example_with_its_ids_and_the_ends_of_its_steps(tiny):
    turn = turn_of(tiny.form, QUESTION, spoiled(QUESTION, 1))
    prompt = [token for segment in tiny.form.question(QUESTION) for token in segment]
    said = turn.completion.ids.tolist()
    labels = [1.0, 0.25, 0.0, 0.0]
    example = step_example(tiny.form, QUESTION, turn, labels)
    assert example.ids.tolist() == [*prompt, *said]
    assert (example.weights, example.question_id, example.trace_keys) == ({}, QUESTION.id, (turn.key,))
    assert not example.retokenised
    np.testing.assert_array_equal(example.step_labels, np.float32(labels))
    parts = np.split(example.ids, example.step_ends + 1)
    assert len(parts[-1]) == 0, "the last step ends with the end token"
    texts = [tiny.form.tokenizer.decode(part.tolist()) for part in parts[:-1]]
    texts[0] = texts[0].removeprefix(tiny.form.tokenizer.decode(prompt))
    assert [text.strip() for text in texts] == spoiled(QUESTION, 1).splitlines()


def test_labels_of_other_steps_are_refused(tiny):
    turn = turn_of(tiny.form, QUESTION, QUESTION.rationale)
    with pytest.raises(AgentArkError, match=rf"turn {turn.key} has 4 steps but 2 labels"):
        step_example(tiny.form, QUESTION, turn, [1.0, 0.0])


def test_another_tokenizers_turn_keeps_its_labels_where_it_has_the_same_steps(tiny, tmp_path):
    train_tokenizer(["nothing in common 0123456789 and = + * -"], 300, tmp_path)
    teacher = PlainFormat(Tokenizer(tmp_path))
    turn = turn_of(teacher, QUESTION, QUESTION.rationale)
    assert turn.call.tokenizer != tiny.form.tokenizer.hash
    example = step_example(tiny.form, QUESTION, turn, [1.0, 1.0, 0.0, 0.0])
    assert example.retokenised
    verbatim = step_example(tiny.form, QUESTION, turn_of(tiny.form, QUESTION, QUESTION.rationale), [1.0, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(example.ids, verbatim.ids)
    np.testing.assert_array_equal(example.step_ends, verbatim.step_ends)
    # The speaker's tokenizer had one step less: its tokens went over one of the text's.
    assert step_example(tiny.form, QUESTION, turn, [1.0, 1.0, 0.0]) is None
    assert len(cuts(QUESTION.rationale)) == 3


def test_coverage_counts_what_can_be_contrasted(tiny):
    examples = planted(tiny.form, "debate", 4)
    total = sum(len(each.step_labels) for each in examples)
    wrong = sum(int((each.step_labels == 0).sum()) for each in examples)
    assert coverage(examples) == {
        "answers": 8,
        "questions": 4,
        "contrasted": 4,
        "steps": total,
        "right": total - wrong,
        "wrong": wrong,
    }
    assert coverage(examples[::2])["contrasted"] == 0, "right answers alone"
    assert coverage(examples[1::2])["contrasted"] == 0, "one answer has nothing to be compared with, whatever its steps"
    assert coverage([]) == dict.fromkeys(("answers", "questions", "contrasted", "steps", "right", "wrong"), 0)
    assert len(steps(tiny.form.response(QUESTION.rationale), tiny.form.tokenizer)) == 4
