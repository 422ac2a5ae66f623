"""The decoder against transformers, and weights in and out."""

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_models import our_logits
from tiny_models import positions_of as rows

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models import transformer
from agentark_jax.models.attention import dense
from agentark_jax.models.config import ModelConfig, Remat, Rope, load_config
from agentark_jax.models.layers import Block, rotation_table
from agentark_jax.models.sharding import on_mesh
from agentark_jax.models.weights import load_params, save_pretrained, weights_fingerprint
from agentark_jax.training.config import MeshConfig
from agentark_jax.training.mesh import make_mesh

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

LENGTH, VOCAB = 1056, 97
KINDS = ["gemma3", "qwen3_tied", "qwen3_untied"]


def tiny(kind: str) -> "transformers.PreTrainedModel":
    """A small random model; large weights, so that every part of the network shows in the logits."""
    torch.manual_seed(KINDS.index(kind))
    shape = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "head_dim": 10}
    if kind == "gemma3":
        config = transformers.Gemma3TextConfig(
            **shape,
            num_hidden_layers=7,  # two periods of three and a remainder of one
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            num_attention_heads=3,
            num_key_value_heads=1,
            sliding_window=37,
            query_pre_attn_scalar=13,
            final_logit_softcapping=3.0,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
            },
        )
        model = transformers.Gemma3ForCausalLM(config)
    else:
        config = transformers.Qwen3Config(
            **shape,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 54321.0},
            tie_word_embeddings=kind == "qwen3_tied",
            attention_bias=True,
        )
        model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


class Case:
    """A tiny model of transformers, its directory, its logits on two rows of ids, and our parameters."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind, self.directory, self.model = kind, directory, tiny(kind)
        self.model.save_pretrained(directory)
        self.ids = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
        with torch.no_grad():
            self.logits = self.model(torch.tensor(self.ids, dtype=torch.int64)).logits.numpy()
        self.config = load_config(directory)
        self.params = load_params(directory, self.config)

    def ours(self, ids: np.ndarray, positions: np.ndarray, segments: np.ndarray | None = None) -> np.ndarray:
        return our_logits(self.config, self.params, ids, positions, segments)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return functools.cache(lambda kind: Case(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@pytest.fixture
def gemma(cases: Callable[[str], Case]) -> Case:
    """For what does not depend on the family."""
    return cases("gemma3")


@pytest.fixture
def tied(cases: Callable[[str], Case]) -> Case:
    return cases("qwen3_tied")


def test_logits_equal_transformers(case: Case) -> None:
    ours = case.ours(case.ids, rows(case.ids))
    assert ours.dtype == np.float32
    assert np.abs(case.logits).max() > 1
    np.testing.assert_allclose(ours, case.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["products", "outputs", "full"])
def test_remat_changes_memory_only(gemma: Case, kind: Remat) -> None:
    ids = gemma.ids[:, :24]

    def loss(params: transformer.Params, remat: Remat) -> jax.Array:
        h = transformer.hidden_states(gemma.config, params, ids, rows(ids), None, remat)
        return jnp.sum(jnp.square(transformer.logits(gemma.config, params, h)))

    plain, remat = (jax.jit(jax.grad(loss), static_argnums=1)(gemma.params, flag) for flag in ("none", kind))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(np.abs(a).max()))


def test_layers_are_recomputed_in_turn_on_cpu(gemma: Case) -> None:
    """The gradients are those of `jax.checkpoint`, which recomputes several layers at a time there."""
    ids, mesh = gemma.ids[:, :256], make_mesh(MeshConfig())
    segments = np.where(np.arange(256) < 100, 1, 2)[None].repeat(2, 0)
    positions = np.where(segments == 1, np.arange(256), np.arange(256) - 100)

    def loss(params: transformer.Params) -> jax.Array:
        h = transformer.hidden_states(gemma.config, params, ids, positions, segments, "full")
        return jnp.sum(jnp.square(h))

    at_once = jax.jit(jax.grad(loss))(gemma.params)
    with on_mesh(mesh):
        in_turn = jax.jit(jax.grad(loss))(gemma.params)
    for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(in_turn), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(a).max()))


def test_packed_and_padded_rows_equal_separate_ones(case: Case) -> None:
    """Three sequences in one row, then padding: each gets the logits it has alone in a row."""
    lengths, ids = [50, 1, 80], case.ids[0]
    pieces = [ids[start : start + n] for start, n in zip([0, 200, 400], lengths, strict=True)]
    packed = np.concatenate([*pieces, np.zeros(13, np.int32)])[None]
    segments = np.repeat([1, 2, 3, 0], [*lengths, 13])[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in [*lengths, 13]])[None].astype(np.int32)
    ours, start = case.ours(packed, positions, segments)[0], 0
    assert np.isfinite(ours).all()
    for piece in pieces:
        with torch.no_grad():
            alone = case.model(torch.tensor(piece[None], dtype=torch.int64)).logits.numpy()[0]
        np.testing.assert_allclose(ours[start : start + len(piece)], alone, rtol=0, atol=1e-4)
        start += len(piece)


def test_prefill_and_decoding_equal_the_whole_forward(case: Case) -> None:
    """Two prompts of different lengths in three of four slots, in scrambled order, past the sliding window."""
    config, params = case.config, transformer.unstack(case.config, case.params)
    lengths = np.array([50, 23], np.int32)
    h, kv = jax.jit(transformer.prefill, static_argnums=0)(config, params, case.ids[:, :52])
    logits = np.asarray(transformer.logits(config, params, h[np.arange(2), lengths - 1]))
    np.testing.assert_allclose(logits, case.logits[[0, 1], lengths - 1], rtol=0, atol=1e-4)
    cache = transformer.init_cache(config, slots=4, length=96)
    assert {layer["k"].shape[2] for layer in cache} == {
        min(96, config.window(kind) or 96) for kind in config.layer_types
    }
    slots, source = jnp.array([2, 0, 3, 4]), jnp.array([0, 1, 1, 0])  # slot 4: skipped
    cache = transformer.insert(config, cache, kv, lengths[source], slots, source)
    assert not any(np.any(layer["k"][1]) for layer in cache)
    step = jax.jit(transformer.decode_step, static_argnums=0, donate_argnums=4)
    source, position = np.array([1, 0, 0, 1]), np.array([23, 0, 50, 23], np.int32)
    for _ in range(45):
        h, cache = step(config, params, case.ids[source, position], position, cache)
        logits = np.asarray(transformer.logits(config, params, h))
        np.testing.assert_allclose(logits, case.logits[source, position], rtol=0, atol=1e-4)
        position = position + 1


def test_insert_refuses_a_prefill_longer_than_the_cache(gemma: Case) -> None:
    kv, cache = transformer.init_cache(gemma.config, 1, 9), transformer.init_cache(gemma.config, 2, 8)
    with pytest.raises(ValueError, match="9 tokens does not fit a cache of 8"):
        transformer.insert(gemma.config, cache, kv, jnp.array([9]), jnp.array([0]), jnp.array([0]))


def test_a_donated_decode_step_copies_no_cache(tied: Case) -> None:
    params, slots, length = transformer.unstack(tied.config, tied.params), 4, 4096
    cache = transformer.init_cache(tied.config, slots, length)
    ids = jnp.zeros(slots, jnp.int32)
    compiled = jax.jit(transformer.decode_step, static_argnums=0, donate_argnums=4).lower(
        tied.config, params, ids, ids, cache
    )
    memory = compiled.compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size


def test_bfloat16_computes_in_bfloat16(tied: Case) -> None:
    half = load_params(tied.directory, tied.config, "bfloat16")
    h = transformer.hidden_states(tied.config, half, tied.ids[:, :40], rows(tied.ids[:, :40]))
    assert h.dtype == jnp.bfloat16
    ours = np.asarray(transformer.logits(tied.config, half, h))
    assert ours.dtype == np.float32
    assert np.corrcoef(ours.ravel(), tied.logits[:, :40].ravel())[0, 1] > 0.99


def test_init_is_deterministic_and_sized_by_the_config(case: Case) -> None:
    first, again, other = (transformer.init_params(case.config, seed) for seed in (1, 1, 2))
    assert jax.tree.structure(first) == jax.tree.structure(case.params)
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, case.params)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True))
    assert not np.array_equal(first["embedding"], other["embedding"])
    assert np.std(first["scanned"]["00"]["mlp"]["down"]) == pytest.approx(case.config.initializer_range, rel=0.1)
    norm = first["final_norm"]["weight"] + case.config.norm_weight_offset
    np.testing.assert_array_equal(norm, np.ones(24))


def test_attention_softcap() -> None:
    """No supported family uses it yet, so the reference is NumPy: one layer, one head."""
    config = ModelConfig(
        **{**vars(small_config()), "attention_softcap": 0.7, "qk_norm": False, "num_heads": 1, "num_kv_heads": 1}
    )
    params = jax.tree.map(lambda leaf: leaf * 20, transformer.init_params(config, 0))
    attention = jax.tree.map(lambda leaf: np.asarray(leaf[0]), params["scanned"]["00"]["attention"])
    block = nnx.merge(
        nnx.split(Block(config, "full_attention", nnx.Rngs(0)))[0],
        jax.tree.map(lambda x: x[0], params["scanned"]["00"]),
    )
    x = np.random.default_rng(0).normal(size=(1, 5, config.hidden_size)).astype(np.float32)
    query, key, value = block.attention.project(
        x, rotation_table(config, np.arange(5)[None], jnp.float32)["full_attention"]
    )
    mask = np.tril(np.ones((1, 5, 5), bool))
    ours = block.attention.mix(functools.partial(dense, mask=mask), query, key, value)
    scores = np.einsum("td,sd->ts", query[0, :, 0], key[0, 0]) * config.query_scale
    assert np.abs(scores).max() > 1
    weights = np.exp(0.7 * np.tanh(scores / 0.7)) * mask[0]
    weights /= weights.sum(-1, keepdims=True)
    expected = weights @ np.asarray(value[0, 0]) @ attention["output"][:, 0].T
    np.testing.assert_allclose(ours[0], expected, rtol=1e-4, atol=1e-5)


# --- weights in and out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_is_loaded_by_transformers_and_reimported_bit_identically(
    case: Case, tmp_path: Path, dtype: str
) -> None:
    params = jax.tree.map(lambda leaf: leaf * 1.01, case.params)
    target = save_pretrained(tmp_path / "model", case.config, params, case.directory, dtype)
    again = load_params(target, load_config(target), dtype)
    for mine, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert theirs.dtype == dtype
        np.testing.assert_array_equal(np.asarray(mine.astype(dtype)), np.asarray(theirs))
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    ids = case.ids[:, :64]
    with torch.no_grad():
        theirs = model(torch.tensor(ids, dtype=torch.int64)).logits.numpy()
    widened = load_params(target, load_config(target))
    h = transformer.hidden_states(case.config, widened, ids, rows(ids))
    np.testing.assert_allclose(transformer.logits(case.config, widened, h), theirs, rtol=0, atol=1e-4)
    assert json.loads((target / "config.json").read_text())["dtype"] == dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_export_replaces_a_directory_even_its_own_source(gemma: Case, tmp_path: Path) -> None:
    target = save_pretrained(tmp_path / "model", gemma.config, gemma.params, gemma.directory)
    before = tensor_bytes(target)
    (target / "tokenizer.json").write_text("{}")
    (target / "stale.txt").write_text("old")
    save_pretrained(target, gemma.config, gemma.params, target)
    assert tensor_bytes(target) == before
    assert (target / "tokenizer.json").read_text() == "{}"
    assert not (target / "stale.txt").exists()
    assert oct((target / "model.safetensors").stat().st_mode)[-3:] == "644"


def tensor_bytes(directory: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(directory / "model.safetensors").items()}


def test_a_failed_export_leaves_the_old_directory(gemma: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = save_pretrained(tmp_path / "model", gemma.config, gemma.params, gemma.directory)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agentark_jax.models.weights.save_file", full)
    with pytest.raises(AgentArkError, match=r"model: cannot be written .*No space left on device"):
        save_pretrained(target, gemma.config, gemma.params, gemma.directory)
    assert (target / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_sharded_weights_and_a_redundant_head_load(case: Case, tmp_path: Path) -> None:
    tensors = load_file(case.directory / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].copy())
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"part{number}.safetensors")
        weight_map.update(dict.fromkeys(part, f"part{number}.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    again = load_params(tmp_path, case.config)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), case.params, again))
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(UsageError, match=r"part1\.safetensors: not found"):
        load_params(tmp_path, case.config)


def test_every_tensor_problem_is_listed(gemma: Case, tmp_path: Path) -> None:
    tensors = load_file(gemma.directory / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.norm.weight"] = np.zeros(25, np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].astype(np.float64)
    tensors["visual.weight"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UsageError) as caught:
        load_params(tmp_path, gemma.config)
    for part in (
        str(tmp_path),
        "missing model.layers.1.self_attn.k_proj.weight",
        "misshaped model.norm.weight in model.safetensors: (25,), expected (24,)",
        "model.layers.0.mlp.up_proj.weight in model.safetensors has dtype F64",
        "unexpected visual.weight in model.safetensors",
    ):
        assert part in str(caught.value)


def test_a_tied_model_with_another_head_is_refused(tied: Case, tmp_path: Path) -> None:
    tensors = load_file(tied.directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="tie_word_embeddings"):
        load_params(tmp_path, tied.config)


def test_damaged_and_missing_weight_files(gemma: Case, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.safetensors: not found"):
        load_params(tmp_path, gemma.config)
    content = (gemma.directory / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(AgentArkError, match=r"model\.safetensors: not a readable safetensors file"):
        load_params(tmp_path, gemma.config)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../escape.safetensors"}}')
    with pytest.raises(UsageError, match="not a plain file name"):
        load_params(tmp_path, gemma.config)


def test_parameters_of_another_model_are_not_written(gemma: Case, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="do not fit the config"):
        save_pretrained(tmp_path / "m", gemma.config, {"embedding": gemma.params["embedding"]}, gemma.directory)
    with pytest.raises(UsageError, match="dtype is 'int8'"):
        save_pretrained(tmp_path / "m", gemma.config, gemma.params, gemma.directory, "int8")
    assert not list(tmp_path.iterdir())


def test_fingerprint_follows_config_weights_and_tokenizer(gemma: Case, tmp_path: Path) -> None:
    target = save_pretrained(tmp_path / "model", gemma.config, gemma.params, gemma.directory)
    with pytest.raises(UsageError, match=r"tokenizer\.json: not found"):
        weights_fingerprint(target)
    (target / "tokenizer.json").write_text("{}")
    seen = {weights_fingerprint(target)}
    assert weights_fingerprint(target) in seen
    (target / "generation_config.json").write_text("{}")
    assert weights_fingerprint(target) in seen
    (target / "tokenizer.json").write_text("{ }")
    seen.add(weights_fingerprint(target))
    (target / "config.json").write_text((target / "config.json").read_text() + " ")
    seen.add(weights_fingerprint(target))
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, target / "model.safetensors")
    seen.add(weights_fingerprint(target))
    assert len(seen) == 4


def test_bfloat16_files_are_read_exactly(gemma: Case, tmp_path: Path) -> None:
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(gemma.directory / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    params = load_params(tmp_path, gemma.config)
    expected = tensors["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(np.asarray(params["embedding"]), expected)


# --- config


GEMMA_V4 = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 64,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 20000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 3000000,
    "sliding_window": 512,
    "sliding_window_pattern": 4,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262144,
}
QWEN_V4 = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 2,
    "num_attention_heads": 16,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def small_config() -> ModelConfig:
    shape = {"head_dim": 8, "hidden_size": 16, "intermediate_size": 8, "vocab_size": 11, "num_hidden_layers": 1}
    return ModelConfig.from_hf({**QWEN_V4, **shape, "num_attention_heads": 2, "num_key_value_heads": 1}, "config.json")


def test_both_spellings_of_gemma_agree() -> None:
    old = ModelConfig.from_hf(GEMMA_V4, "config.json")
    kinds = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(26)]
    dropped = ("rope_scaling", "rope_theta", "rope_local_base_freq", "sliding_window_pattern", "torch_dtype")
    new = {key: value for key, value in GEMMA_V4.items() if key not in dropped} | {
        "dtype": "bfloat16",
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": {"factor": 8.0, "rope_type": "linear", "rope_theta": 3000000},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20000},
        },
    }
    assert ModelConfig.from_hf(new, "config.json") == old
    assert old.layer_types == tuple(kinds)
    assert (old.period, old.num_periods, old.eos_token_ids) == (4, 6, (1, 106))
    assert (old.rope_full, old.rope_sliding) == (Rope(3e6, 8.0), Rope(2e4))
    assert (old.query_scale, old.embedding_scale, old.tie_embeddings) == (1 / 8, 1152**0.5, True)


def test_both_spellings_of_qwen_agree() -> None:
    old = ModelConfig.from_hf(QWEN_V4, "config.json")
    new = {key: value for key, value in QWEN_V4.items() if not key.startswith("rope")} | {
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    }
    assert ModelConfig.from_hf(new, "config.json") == old
    assert (old.rope_full, old.period, old.num_periods) == (Rope(1e6), 1, 4)
    windowed = ModelConfig.from_hf({**QWEN_V4, "use_sliding_window": True, "sliding_window": 9}, "config.json")
    assert windowed.layer_types == ("full_attention",) * 2 + ("sliding_attention",) * 2
    assert windowed.window("sliding_attention") == 9


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (GEMMA_V4, {"model_type": "mamba"}, r"'mamba' is not supported; supported are \['gemma', 'gemma3_text'"),
        (GEMMA_V4, {"model_type": None}, "key model_type: None is not supported"),
        (GEMMA_V4, {"model_type": "gemma3"}, "multimodal"),
        (GEMMA_V4, {"logit_scale": 2.0}, r"unknown keys \['logit_scale'\]"),
        (GEMMA_V4, {"rope_theta": None}, "rope_theta is None"),
        (GEMMA_V4, {"rope_local_base_freq": None}, "key rope_local_base_freq: rope_theta is None"),
        (GEMMA_V4, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'; supported are"),
        (GEMMA_V4, {"rope_scaling": {"rope_type": "linear"}}, "factor is None"),
        (GEMMA_V4, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, r"has \['beta'\]"),
        (GEMMA_V4, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: is 0"),
        (GEMMA_V4, {"sliding_window_pattern": None}, "key layer_types: is missing"),
        (GEMMA_V4, {"sliding_window": None}, "sliding_window is None"),
        (GEMMA_V4, {"layer_types": ["full_attention"]}, "26 entries"),
        (GEMMA_V4, {"hidden_activation": "relu"}, "hidden_activation: is 'relu'"),
        (GEMMA_V4, {"use_bidirectional_attention": True}, "use_bidirectional_attention: is True"),
        (GEMMA_V4, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: is 50.0"),
        (GEMMA_V4, {"final_logit_softcapping": -1}, "final_softcap is -1"),
        (GEMMA_V4, {"eos_token_id": "x"}, "eos_token_id: is 'x'"),
        (QWEN_V4, {"hidden_size": "1024"}, "hidden_size: is '1024'"),
        (QWEN_V4, {"hidden_size": 10.5}, "whole number"),
        (QWEN_V4, {"num_hidden_layers": 0}, "no layers"),
        (QWEN_V4, {"vocab_size": -1}, "vocab_size is -1"),
        (QWEN_V4, {"num_key_value_heads": 3}, "not a multiple"),
        (QWEN_V4, {"head_dim": None}, "key head_dim: is missing"),
        (QWEN_V4, {"attention_bias": "no"}, "true or false"),
        (QWEN_V4, {"rope_parameters": {"rope_theta": 1e4}}, "keep one of them"),
        (QWEN_V4, {"quantization_config": {"bits": 4}}, "quantization_config: quantised weights are not supported"),
    ],
)
def test_bad_configs_name_file_and_key(base: dict, change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        ModelConfig.from_hf({**base, **change}, "some/config.json")
    assert "some/config.json" in str(caught.value)


def test_unreadable_config_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json: not found"):
        load_config(tmp_path)
    for text, problem in (("{", "not readable as JSON"), ("[]", "not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UsageError, match=problem):
            load_config(tmp_path)
