"""The PRM head and the value head: what they compute, and their file."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.heads import HEAD_FILE, init_head, load_heads, save_heads, step_logits, values
from agentark_jax.models.source import ScratchConfig

CONFIG = ModelConfig.from_hf(ScratchConfig(hidden_size=12).to_hf(vocabulary=300, bos_id=None, eos_id=1), "config.json")


@pytest.fixture
def h() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 7, 12)).astype(np.float32)


def test_steps_are_labelled_where_they_end(h: np.ndarray) -> None:
    head = init_head(CONFIG, "prm", 0)
    head["bias"] = jnp.array([0.5, -2.0])
    positions = np.array([[0, 6, 3], [2, 2, 0]])
    found = step_logits(head, h, positions)
    assert found.shape == (2, 3, 2)
    for row, step in np.ndindex(2, 3):
        expected = np.asarray(head["weight"]) @ h[row, positions[row, step]] + [0.5, -2.0]
        np.testing.assert_allclose(found[row, step], expected, rtol=1e-5, atol=1e-6)


def test_every_position_has_a_value(h: np.ndarray) -> None:
    head = init_head(CONFIG, "value", 0)
    head["bias"] = jnp.array([3.0])
    np.testing.assert_allclose(values(head, h), h @ np.asarray(head["weight"])[0] + 3, rtol=1e-5, atol=1e-6)


def test_scores_are_float32_and_reach_head_and_model(h: np.ndarray) -> None:
    half = jnp.asarray(h, jnp.bfloat16)
    for kind, apply in (("prm", lambda head, h: step_logits(head, h, np.array([[1], [4]]))), ("value", values)):
        head = init_head(CONFIG, kind, 3)
        assert apply(head, half).dtype == jnp.float32
        gradients = jax.grad(lambda head, h, apply=apply: jnp.sum(jnp.square(apply(head, h) - 1)), (0, 1))(head, h)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_init_is_by_seed() -> None:
    first, again, other = (init_head(CONFIG, "prm", seed)["weight"] for seed in (1, 1, 2))
    assert first.shape == (2, 12)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_heads_live_in_one_file(tmp_path: Path) -> None:
    heads = {kind: init_head(CONFIG, kind, 4) for kind in ("prm", "value")}
    path = save_heads(tmp_path, heads)
    assert path == tmp_path / HEAD_FILE
    assert load_file(path).keys() == {"prm.weight", "prm.bias", "value.weight", "value.bias"}
    found = load_heads(tmp_path, CONFIG)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), found, heads))
    save_heads(tmp_path, {"value": heads["value"]})
    assert load_heads(tmp_path, CONFIG).keys() == {"value"}
    assert [file.name for file in tmp_path.iterdir()] == [HEAD_FILE]


def test_unusable_files(tmp_path: Path) -> None:
    path = tmp_path / HEAD_FILE
    with pytest.raises(UsageError, match=r"head\.safetensors: not found"):
        load_heads(tmp_path, CONFIG)
    path.write_bytes(b"cut")
    with pytest.raises(AgentArkError, match=r"head\.safetensors: not a readable"):
        load_heads(tmp_path, CONFIG)
    save_file({"prm.weight": np.zeros((2, 13), np.float32), "score.weight": np.zeros(1, np.float32)}, path)
    with pytest.raises(UsageError) as caught:
        load_heads(tmp_path, CONFIG)
    for part in ("unexpected score.weight", "missing prm.bias", "misshaped prm.weight: (2, 13), expected (2, 12)"):
        assert part in str(caught.value)
    save_file({}, path)
    with pytest.raises(UsageError, match="no heads"):
        load_heads(tmp_path, CONFIG)
