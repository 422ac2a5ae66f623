"""Process reward models from examples to files: what each stage trains, what it carries over, how it is resumed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from prm_models import planted, student
from rich.console import Console
from safetensors.numpy import load_file, save_file
from test_training import assert_relative, child_environment, compilation_cache, read_until  # noqa: F401

from agentark_jax.data.config import PromptConfig
from agentark_jax.data.loader import packed_batches
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.heads import HEAD_FILE, init_head, load_heads, save_heads
from agentark_jax.models.transformer import hidden_states
from agentark_jax.models.weights import load_params
from agentark_jax.objectives.config import RELEASE
from agentark_jax.objectives.prm import HEAD, PRM, PROJECTOR, init_projector
from agentark_jax.process import train_prm
from agentark_jax.progress import Display
from agentark_jax.stages import Work
from agentark_jax.training.config import FitConfig, MeshConfig
from agentark_jax.training.loop import examples_hash
from agentark_jax.training.mesh import make_mesh
from agentark_jax.training.prm import CARD_FILE, PROJECTOR_FILE, load_beside, load_prm, prm_fingerprint, read_card
from agentark_jax.training.prm_config import PRMConfig
from agentark_jax.training.state import initial_state, make_optimizer, partition, state_shardings
from agentark_jax.training.step import make_step

FIT = FitConfig(learning_rate=3e-3, rows=4, row_length=192, epochs=1, checkpoint_every=2)
CONFIG = PRMConfig(frozen=replace(FIT, last_layers=1), whole=FIT)
RELEASED = replace(CONFIG, faithful_to="release")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return student(tmp_path_factory.mktemp("tiny") / "student", layers=3)


@pytest.fixture(scope="module")
def examples(tiny):
    return planted(tiny.form, "debate", 10)


def silent() -> Display:
    return Display(Console(quiet=True))


def trained(directory, tiny, examples, config=CONFIG, **options):
    work = Work(directory)
    place = train_prm(work, config, tiny, PromptConfig(), examples, **{"seed": 3, "display": silent(), **options})
    return place, work


def tensors(directory: Path) -> dict[str, np.ndarray]:
    names = ("model.safetensors", HEAD_FILE, PROJECTOR_FILE)
    return {
        f"{name}:{key}": value
        for name in names
        if (directory / name).is_file()
        for key, value in load_file(directory / name).items()
    }


def changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    assert before.keys() <= after.keys()
    return {name for name, value in before.items() if not np.array_equal(value, after[name])}


@pytest.fixture(scope="module")
def released(tiny, examples, tmp_path_factory):
    """The directory and the record of a training with the release's loss, which has a projector."""
    directory = tmp_path_factory.mktemp("released")
    return directory, *trained(directory, tiny, examples, RELEASED)


def test_the_first_stage_trains_the_last_layer_head_and_projector_and_nothing_else(tiny, released):
    directory, _, work = released
    before, after = tensors(tiny.directory), tensors(directory / "frozen" / "model")
    last = {name for name in before if ".layers.2." in name}
    assert last
    assert changed(before, after) == last, "all else is the student's, bit by bit"
    fresh = load_beside(tiny.directory, tiny.config, PRM(RELEASED.terms(), RELEASED.temperature), 3)
    found = load_beside(directory / "frozen" / "model", tiny.config, PRM(RELEASED.terms(), RELEASED.temperature), 99)
    for path, leaf in flatten_dict(fresh, sep=".").items():
        assert np.any(np.asarray(leaf) != flatten_dict(found, sep=".")[path]), path
    layer = sum(before[name].size for name in last)
    beside = sum(leaf.size for leaf in jax.tree.leaves(found))
    assert work.counts["frozen"]["trainable"] == layer + beside


def test_the_second_stage_starts_from_the_first_and_trains_everything(released):
    directory, place, work = released
    first, second = tensors(directory / "frozen" / "model"), tensors(place)
    assert changed(first, second) == set(first)
    assert place == directory / "whole" / "model"
    assert work.counts["whole"]["trainable"] == sum(leaf.size for leaf in second.values())
    # What is trained from fresh heads, or from the student, is another model.
    assert work.counts["location"] == "whole/model"
    assert work.counts["revision"] == prm_fingerprint(place)
    assert work.tokens == work.counts["frozen"]["tokens"] + work.counts["whole"]["tokens"]


def test_head_and_projector_are_carried_over_exactly(tiny, examples, released, tmp_path):
    """A second stage of no consequence leaves what it was given."""
    directory, _, _ = released
    objective = PRM(RELEASED.terms(), RELEASED.temperature)
    given = load_beside(directory / "frozen" / "model", tiny.config, objective, seed=12345)
    still = replace(RELEASED, whole=replace(FIT, learning_rate=1e-30, steps=1, weight_decay=0.0))
    place, _ = trained(tmp_path, tiny, examples, still)
    kept = load_beside(place, tiny.config, objective, seed=54321)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), kept, given)


def test_the_paper_has_no_projector_and_its_card_says_what_it_is(tiny, examples, tmp_path):
    place, work = trained(tmp_path, tiny, examples, replace(CONFIG, whole=None))
    assert place == tmp_path / "frozen" / "model"
    assert not (place / PROJECTOR_FILE).exists()
    card = read_card(place)
    assert (card.tokenizer, card.template) == (tiny.form.tokenizer.hash, tiny.form.hash)
    assert (card.labels, card.coefficients, card.temperature) == ("consensus", {"contrastive": 1.0}, 0.1)
    assert card.counts == work.counts["examples"]
    assert card.counts["contrasted"] == card.counts["questions"] == 10
    assert card.counts["answers"] == 20
    assert "whole" not in work.counts
    assert not (tmp_path / "frozen" / "checkpoints").exists()
    found = load_prm(place, make_mesh(MeshConfig()))
    np.testing.assert_array_equal(found.head["weight"], load_heads(place, tiny.config)["prm"]["weight"])


def test_a_model_with_a_head_goes_on_from_it(tiny, examples, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for file in tiny.directory.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    head = init_head(tiny.config, "prm", 8)
    save_heads(own, {"prm": head, "value": init_head(tiny.config, "value", 8)})
    found = load_beside(own, tiny.config, PRM(RELEASE), 3)
    np.testing.assert_array_equal(found[HEAD]["weight"], head["weight"])
    np.testing.assert_array_equal(
        found[PROJECTOR]["first"]["weight"], init_projector(tiny.config.hidden_size, 4)["first"]["weight"]
    )
    assert load_beside(own, tiny.config, PRM({"contrastive": 1.0}), 3).keys() == {HEAD}


def test_a_finished_stage_is_not_done_again_and_another_is(tiny, examples, released, monkeypatch):
    directory, place, work = released
    before = {path: path.stat().st_mtime_ns for path in directory.glob("*/model/*")}
    again, other = trained(directory, tiny, examples, RELEASED)
    assert again == place
    assert other.counts == work.counts
    assert other.tokens == work.tokens
    assert {path: path.stat().st_mtime_ns for path in directory.glob("*/model/*")} == before
    assert read_card(place).made_from != read_card(directory / "frozen" / "model").made_from


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import test_prm_training as t
from agentark_jax.progress import Bar
from prm_models import planted, student
root = Path(sys.argv[1])
tiny = student(root / "student", layers=3)
count = 0
def told(self, done, total, tokens):
    global count
    count += 1
    print(count, flush=True)
Bar.set = told
t.trained(root, tiny, planted(tiny.form, "debate", 10), t.KILLED)
"""
KILLED = replace(RELEASED, frozen=replace(CONFIG.frozen, epochs=3), whole=replace(FIT, epochs=3))


@pytest.mark.slow
def test_a_training_killed_in_either_stage_resumes_bit_by_bit(tiny, examples, tmp_path):
    _, undisturbed = trained(tmp_path / "whole", tiny, examples, KILLED)
    here = Path(__file__).resolve()
    steps = undisturbed.counts["frozen"]["steps"]
    assert steps >= 6
    for name, at in (("first", 3), ("second", steps + 3)):
        directory = tmp_path / name
        directory.mkdir()
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(directory), str(here.parent), str(here.parent.parent)],
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(),
        )
        read_until(child, at)
        child.kill()
        child.communicate()
        assert (directory / "frozen" / "model" / CARD_FILE).exists() == (name == "second")
        assert not (directory / "whole" / "model" / CARD_FILE).exists()
        place, work = trained(directory, tiny, examples, KILLED)
        assert work.counts == undisturbed.counts
        assert changed(tensors(tmp_path / "whole" / "whole" / "model"), tensors(place)) == set()


def one_step(tiny, batch, objective, params, **changes):
    """(metrics, first moments) of one step: gradients, not Adam's signs of them."""
    config = replace(FIT, **changes)
    trainable, frozen = partition(params, [], last_layers=config.last_layers)
    beside = {HEAD: init_head(tiny.config, "prm", 1), PROJECTOR: init_projector(tiny.config.hidden_size, 2)}
    if "supervised_contrastive" not in objective.coefficients:
        del beside[PROJECTOR]
    trainable = jax.tree.map(jnp.copy, trainable | flatten_dict(beside, sep="."))
    optimizer, mesh = make_optimizer(config, 10), make_mesh(MeshConfig())
    shardings = state_shardings(mesh, optimizer, trainable)
    state = initial_state(mesh, optimizer, trainable)
    state, metrics = make_step(config, tiny.config, objective, 10, shardings)(state, frozen, batch)
    return {name: float(value) for name, value in metrics.items()}, optax.tree.get(state.optimizer, "mu")


@pytest.fixture(scope="module")
def params(tiny):
    """Calmer ones than the student's, so that rounding stays rounding."""
    return jax.tree.map(lambda leaf: leaf / 5, load_params(tiny.directory, tiny.config))


def batch_of(examples, rows, row_length, together):
    data = packed_batches(examples, seed=0, epochs=1, rows=rows, row_length=row_length, together=together)
    assert len(data) == 1
    return data, next(data.iterate(0, 1))


def assert_same_step(found, expected):
    """Metrics, and gradients: each array, and more exactly all together, of which some all but cancel out."""
    (metrics, gradients), (expected_metrics, expected_gradients) = found, expected
    assert_relative(metrics, expected_metrics)
    assert_relative(gradients, expected_gradients, 1e-4)
    one, other = (
        np.concatenate([np.ravel(leaf) for _, leaf in sorted(each.items())]) for each in (gradients, expected_gradients)
    )
    assert_relative(one, other)


def test_packed_equals_unpacked(tiny, params, examples):
    objective = PRM({"contrastive": 1.0, **RELEASE})
    few = examples[:8]
    packed, one = batch_of(few, 4, 256, None)
    assert max(map(len, packed.plan[0])) > 1
    alone, eight = batch_of(few, 8, max(len(each.ids) for each in few), None)
    assert max(map(len, alone.plan[0])) == 1
    expected = one_step(tiny, eight, objective, params, rows=8)
    assert_same_step(one_step(tiny, one, objective, params), expected)
    assert all(expected[0][term] > 0 for term in objective.coefficients)


def test_questions_kept_together_make_micro_batches_add_up(tiny, params, examples):
    """And not kept together they would not: the negatives of a step are in another micro-batch."""
    few = examples[:8]
    objective = PRM({"contrastive": 1.0, "cross_entropy": 0.5})
    data, batch = batch_of(few, 8, max(len(each.ids) for each in few), 2)
    for start in range(0, 8, 2):
        assert len({few[index].question_id for row in data.plan[0][start : start + 2] for index in row}) == 1
    expected = one_step(tiny, batch, objective, params, rows=8)
    assert_same_step(one_step(tiny, batch, objective, params, rows=8, accumulation=4), expected)
    apart = jax.tree.map(lambda array: array[[0, 2, 4, 6, 1, 3, 5, 7]], batch)
    torn, _ = one_step(tiny, apart, objective, params, rows=8, accumulation=4)
    assert torn["contrastive"] < 0.5 * expected[0]["contrastive"]


@pytest.mark.parametrize(
    ("objective", "changes", "layers"), [(PRM({"contrastive": 1.0}), {"last_layers": 1}, 1), (PRM(RELEASE), {}, 3)]
)
def test_every_parameter_of_a_stage_has_a_gradient(tiny, params, examples, objective, changes, layers):
    _, batch = batch_of(examples[:8], 8, max(len(each.ids) for each in examples[:8]), 8)
    _, moments = one_step(tiny, batch, objective, params, rows=8, **changes)
    beside = {HEAD, PROJECTOR} if objective.coefficients == RELEASE else {HEAD}
    assert {path.split(".")[0] for path in moments} - {"embedding", "final_norm"} == {"scanned", *beside}
    for path, moment in moments.items():
        size = np.abs(np.asarray(moment))
        assert size.max() > 0, path
        if path.startswith("scanned."):
            assert size.shape[0] == layers
            assert np.all(size.max(axis=tuple(range(1, size.ndim))) > 0), path


def test_labels_that_contrast_nothing_are_refused(tiny, examples, tmp_path):
    right = [replace(each, step_labels=np.ones_like(each.step_labels)) for each in examples]
    with pytest.raises(AgentArkError, match=r"none of 10 questions .* prm\.labels"):
        trained(tmp_path, tiny, right)
    with pytest.raises(UsageError, match="the trajectories of a question must be in one micro-batch"):
        trained(tmp_path, tiny, examples, replace(CONFIG, frozen=replace(FIT, rows=2, accumulation=2, row_length=130)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"faithful_to": "code"}, "faithful_to: 'code' .* paper, release"),
        ({"labels": "gold"}, "labels: 'gold' .* consensus, debate"),
        ({"coefficients": {"bce": 1.0}}, "coefficients: 'bce' .* cross_entropy"),
        ({"coefficients": {"contrastive": -1.0}}, r"coefficients\.contrastive: -1\.0"),
        ({"coefficients": {"contrastive": 0.0}}, "coefficients: .* a factor above zero"),
        ({"coefficients": {}}, "coefficients: .* a factor above zero"),
        ({"temperature": 0.0}, "temperature: 0"),
        ({"wrong_weight": 0.0}, "wrong_weight: 0"),
        ({"wrong_weight": 2.0}, r"wrong_weight: 2\.0 .* 1 without the term cross_entropy"),
        ({"continuations": 0}, "continuations: 0 .* at least 1"),
        ({"questions": 0}, "questions: 0 .* null"),
        ({"turns": 1}, "turns: 1 .* at least 2 for the contrastive"),
        ({"frozen": FitConfig(coefficients={"answer": 1.0})}, r"frozen\.coefficients: .* prm\.coefficients"),
    ],
)
def test_bad_config(values, message):
    with pytest.raises(UsageError, match=message):
        PRMConfig(**values)


def test_a_weight_makes_another_model_and_no_weight_the_same():
    weighted, plain = (PRMConfig(faithful_to="release", wrong_weight=weight) for weight in (2.0, 1.0))
    assert weighted.fingerprint() != plain.fingerprint()
    assert "wrong_weight" not in str(PRMConfig().fingerprint()), "models of before stay what they are"


def test_whose_loss():
    assert PRMConfig().terms() == {"contrastive": 1.0}
    assert PRMConfig(faithful_to="release").terms() == {
        "cross_entropy": 1.0,
        "supervised_contrastive": 0.5,
    }
    own = PRMConfig(faithful_to="release", coefficients={"cross_entropy": 2.0, "contrastive": 0.0}, turns=1)
    assert own.terms() == {"cross_entropy": 2.0}
    assert PRMConfig().fingerprint() != own.fingerprint()
    assert PRMConfig().labels_fingerprint() == PRMConfig(continuations=9, hard=True).labels_fingerprint()
    paid = PRMConfig(labels="continuations")
    assert paid.labels_fingerprint() != replace(paid, continuations=9).labels_fingerprint()


def test_files_that_are_no_process_reward_model(tiny, released, tmp_path):
    _, place, _ = released
    mesh = make_mesh(MeshConfig())
    with pytest.raises(UsageError, match=r"prm\.json: not found"):
        load_prm(tiny.directory, mesh)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in place.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert prm_fingerprint(copy) == prm_fingerprint(place)
    projector = load_file(copy / PROJECTOR_FILE)
    save_file({**projector, "first.bias": np.zeros(3, np.float32)}, copy / PROJECTOR_FILE)
    with pytest.raises(UsageError, match=r"projector\.safetensors: its tensors are"):
        load_beside(copy, tiny.config, PRM(RELEASE), 0)
    assert prm_fingerprint(copy) != prm_fingerprint(place)
    (copy / PROJECTOR_FILE).write_bytes(b"no")
    with pytest.raises(AgentArkError, match=r"projector\.safetensors: not a readable"):
        load_beside(copy, tiny.config, PRM(RELEASE), 0)
    save_heads(copy, {"value": init_head(tiny.config, "value", 0)})
    with pytest.raises(UsageError, match="no head `prm`"):
        load_prm(copy, mesh)
    card = json.loads((copy / CARD_FILE).read_text())
    (copy / CARD_FILE).write_text(json.dumps({**card, "template": "other"}))
    with pytest.raises(UsageError, match="key template: other"):
        load_prm(copy, mesh)
    (copy / CARD_FILE).write_text(json.dumps({**card, "surprise": 1}))
    with pytest.raises(UsageError, match="not readable"):
        read_card(copy)
    with pytest.raises(UsageError, match="the rollouts: its ids are of the tokenizer abc"):
        read_card(place).check_tokenizer("abc", "the rollouts")


def test_labels_are_part_of_what_a_fit_is(examples):
    other = [replace(examples[0], step_labels=1 - examples[0].step_labels), *examples[1:]]
    assert examples_hash(other) != examples_hash(examples)


def test_trained_hidden_states_are_those_of_the_saved_model(tiny, released):
    """The head's file belongs to the weights beside it: the loss of the saved model is near the last one told."""
    directory, place, work = released
    found = load_prm(place, make_mesh(MeshConfig()))
    ids = np.arange(4, 20, dtype=np.int32)[None]
    h = hidden_states(found.config, found.params, ids, np.arange(16, dtype=np.int32)[None])
    assert np.isfinite(np.asarray(h)).all()
    assert (directory / "whole" / "training.json").is_file()
    assert work.counts["whole"]["final_loss"] > 0
