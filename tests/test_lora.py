"""Adapters: beside the weights, merged into them, and in PEFT's files."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models import transformer
from agentark_jax.models.config import LORA_TARGETS, Lora, ModelConfig
from agentark_jax.models.lora import init_adapter, join, load_adapter, merge, save_adapter, split
from agentark_jax.models.source import ScratchConfig
from agentark_jax.models.weights import load_params, save_pretrained

RAW = ScratchConfig(hidden_size=20, layers=5, heads=6, kv_heads=2, head_dim=6, intermediate_size=28).to_hf(
    vocabulary=43, bos_id=None, eos_id=1
)
# Two repetitions of two layers, and one layer left over.
RAW |= {"layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"], "attention_bias": True}
RAW |= {"use_sliding_window": True, "sliding_window": 5}
BASE = ModelConfig.from_hf(RAW, "config.json")
ADAPTED = replace(BASE, lora=Lora(3, 12.0))
IDS = np.random.default_rng(0).integers(0, 43, (2, 32))
POSITIONS = np.broadcast_to(np.arange(32), IDS.shape)


@pytest.fixture(scope="module")
def base() -> transformer.Params:
    """Matrices of a size that lets every layer speak; norms stay, or attention would be too sharp for float32."""
    fresh = flatten_dict(transformer.init_params(BASE, 0))
    return unflatten_dict({path: leaf if "norm" in str(path) else leaf * 5 for path, leaf in fresh.items()})


def trained(config: ModelConfig) -> transformer.Params:
    """An adapter as after training: nothing is zero."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + 0.2 * random.normal(size=leaf.shape), init_adapter(config, 0))


def logits(config: ModelConfig, params: transformer.Params) -> jax.Array:
    run = jax.jit(transformer.hidden_states, static_argnums=0)
    return transformer.logits(config, params, run(config, params, IDS, POSITIONS))


def same(a: transformer.Params, b: transformer.Params) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool(jnp.array_equal(x, y)), a, b))


def test_a_fresh_adapter_changes_nothing(base: transformer.Params) -> None:
    adapter = init_adapter(ADAPTED, 0)
    assert np.array_equal(logits(ADAPTED, join(base, adapter)), logits(BASE, base))
    for path, leaf in flatten_dict(adapter).items():
        assert np.any(leaf) == (path[-1] == "a"), path
    query = adapter["scanned"]["01"]["attention"]["adapters"]["query"]
    assert (query["a"].shape, query["b"].shape) == ((2, 3, 20), (2, 36, 3))
    assert np.std(query["a"]) == pytest.approx(20**-0.5, rel=0.2)
    assert same(adapter, init_adapter(ADAPTED, 0))
    assert not same(adapter, init_adapter(ADAPTED, 1))


def test_base_and_adapter_part_and_join(base: transformer.Params) -> None:
    adapter = init_adapter(ADAPTED, 0)
    whole = join(base, adapter)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(lambda s: s.shape, transformer.param_shapes(ADAPTED))
    for part, expected in zip(split(whole), (base, adapter), strict=True):
        assert same(part, expected)


@pytest.mark.parametrize(
    "targets", [tuple(LORA_TARGETS), ("v_proj", "q_proj"), ("o_proj",), ("gate_proj", "down_proj")]
)
def test_merged_equals_applied(base: transformer.Params, targets: tuple[str, ...]) -> None:
    config = replace(BASE, lora=Lora(2, 5.0, targets))
    whole = join(base, trained(config))
    applied = logits(config, whole)
    plain, merged = merge(config, whole)
    assert plain == BASE
    assert same(jax.tree.map(jnp.zeros_like, merged), jax.tree.map(jnp.zeros_like, base))
    assert np.abs(applied - logits(BASE, base)).max() > 0.1
    np.testing.assert_allclose(logits(BASE, merged), applied, rtol=1e-5, atol=1e-5)
    changed = {path[-1] for path, leaf in flatten_dict(merged).items() if not np.array_equal(leaf, at(base, path))}
    assert changed == {LORA_TARGETS[target][1] for target in targets}


def at(tree: transformer.Params, path: tuple[str, ...]) -> jax.Array:
    return flatten_dict(tree)[path]


def test_generation_uses_the_adapter(base: transformer.Params) -> None:
    whole = join(base, trained(ADAPTED))
    params, lengths = transformer.unstack(ADAPTED, whole), np.array([20, 20])
    h, kv = transformer.prefill(ADAPTED, params, IDS[:, :20])
    cache = transformer.init_cache(ADAPTED, 2, 32)
    cache = transformer.insert(ADAPTED, cache, kv, lengths, jnp.arange(2), jnp.arange(2))
    following, _ = transformer.decode_step(ADAPTED, params, IDS[:, 20], lengths, cache)
    found = transformer.logits(ADAPTED, params, jnp.stack([h[:, -1], following], 1))
    np.testing.assert_allclose(found, logits(ADAPTED, whole)[:, 19:21], rtol=1e-4, atol=1e-4)


def test_a_float32_adapter_stands_beside_a_bfloat16_base(base: transformer.Params) -> None:
    whole = join(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base), trained(ADAPTED))
    h = transformer.hidden_states(ADAPTED, whole, IDS, POSITIONS)
    assert h.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(merge(ADAPTED, whole)[1])} == {jnp.dtype(jnp.bfloat16)}


def test_every_adapter_has_a_gradient(base: transformer.Params) -> None:
    def loss(adapter: transformer.Params) -> jax.Array:
        params = join(base, adapter)
        h = transformer.hidden_states(ADAPTED, params, IDS, POSITIONS, None, "full")
        return jnp.sum(jnp.square(transformer.logits(ADAPTED, params, h)))

    for path, leaf in flatten_dict(jax.jit(jax.grad(loss))(trained(ADAPTED))).items():
        assert np.all(np.any(leaf, axis=(-1, -2))), path  # in every layer of the stack


# --- files


def test_files_have_the_names_and_shapes_of_peft(tmp_path: Path) -> None:
    config = replace(BASE, lora=Lora(3, 12.0, ("q_proj", "o_proj", "down_proj")))
    adapter = trained(config)
    save_adapter(tmp_path / "adapter", config, adapter, "org/base")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    sizes = {"self_attn.q_proj": (20, 36), "self_attn.o_proj": (36, 20), "mlp.down_proj": (28, 20)}
    expected = {}
    for layer in range(5):
        for name, (inputs, outputs) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            expected |= {f"{stem}.lora_A.weight": (3, inputs), f"{stem}.lora_B.weight": (outputs, 3)}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    stacked = adapter["scanned"]["01"]["attention"]["adapters"]["output"]["b"]
    found = tensors["base_model.model.model.layers.3.self_attn.o_proj.lora_B.weight"]
    assert np.array_equal(found, stacked[1])  # layer 3 is the second of the two that stand at 01
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (raw["peft_type"], raw["r"], raw["lora_alpha"], raw["base_model_name_or_path"]) == (
        "LORA",
        3,
        12,
        "org/base",
    )
    assert raw["target_modules"] == ["q_proj", "o_proj", "down_proj"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("targets", [tuple(LORA_TARGETS), ("k_proj", "up_proj")])
def test_an_adapter_comes_back_as_it_went(base: transformer.Params, tmp_path: Path, targets: tuple[str, ...]) -> None:
    config = replace(BASE, lora=Lora(3, 7.5, targets))
    adapter = trained(config)
    save_adapter(tmp_path / "a", config, join(base, adapter), "base")
    found_config, found = load_adapter(tmp_path / "a", BASE)
    assert found_config == config
    assert same(found, adapter)


def test_files_of_a_model_never_lose_an_adapter_silently(base: transformer.Params, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    whole = join(base, trained(ADAPTED))
    with pytest.raises(UsageError, match="merge it first"):
        save_pretrained(tmp_path / "m", ADAPTED, whole, tmp_path)
    target = save_pretrained(tmp_path / "m", *merge(ADAPTED, whole), tmp_path)
    np.testing.assert_allclose(logits(BASE, load_params(target, BASE)), logits(ADAPTED, whole), rtol=1e-5, atol=1e-5)
    assert same(load_params(target, ADAPTED), load_params(target, BASE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "key use_dora: True is not supported"),
        ({"use_rslora": True}, "key use_rslora"),
        ({"bias": "all"}, "key bias: 'all'"),
        ({"rank_pattern": {"q_proj": 4}}, "key rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "key modules_to_save"),
        ({"init_lora_weights": "pissa"}, "key init_lora_weights: 'pissa'"),
        ({"peft_type": "IA3"}, "key peft_type: 'IA3'"),
        ({"new_idea": 1}, "key new_idea: 1 is not supported"),
        ({"r": None}, "r is None"),
        ({"r": 0}, r"lora\.rank is 0"),
        ({"lora_alpha": "16"}, "lora_alpha '16'"),
        ({"target_modules": "all-linear"}, "key target_modules: 'all-linear'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "key target_modules"),
        ({"target_modules": []}, r"lora\.targets is \[\]"),
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    save_adapter(tmp_path / "a", ADAPTED, init_adapter(ADAPTED, 0), "base")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=message) as caught:
        load_adapter(tmp_path / "a", BASE)
    assert str(path) in str(caught.value)


def test_damaged_adapter_files(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", ADAPTED, init_adapter(ADAPTED, 0), "base")
    with pytest.raises(UsageError) as caught:
        load_adapter(tmp_path / "a", replace(BASE, num_kv_heads=3, layer_types=BASE.layer_types[:4]))
    for part in (
        "misshaped base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight in adapter_model.safetensors: (12,",
        "unexpected base_model.model.model.layers.4.mlp.down_proj.lora_A.weight",
    ):
        assert part in str(caught.value)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"]
    save_file(tensors, path)
    with pytest.raises(UsageError, match=r"missing base_model\.model\.model\.layers\.2\.mlp\.up_proj\.lora_A\.weight"):
        load_adapter(tmp_path / "a", BASE)
    path.write_bytes(b"cut")
    with pytest.raises(AgentArkError, match="not a readable safetensors file"):
        load_adapter(tmp_path / "a", BASE)
    path.unlink()
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors: not found"):
        load_adapter(tmp_path / "a", BASE)


def test_impossible_adapters() -> None:
    for arguments, message in (((0, 1.0), "rank is 0"), ((2, 0.0), "alpha is 0"), ((2, 1.0, ("lm_head",)), "targets")):
        with pytest.raises(UsageError, match=message):
            Lora(*arguments)
    with pytest.raises(UsageError, match="the config has no lora"):
        init_adapter(BASE, 0)
