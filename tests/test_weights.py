"""Sharded weight files, weights placed on several devices, stored dtypes, and what is said of damaged files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models import transformer
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.source import ScratchConfig
from agentark_jax.models.weights import load_params, save_pretrained, weights_fingerprint

RAW = ScratchConfig(hidden_size=16, layers=5, head_dim=6, intermediate_size=24).to_hf(
    vocabulary=41, bos_id=None, eos_id=1
)
# Two repetitions of two layers, and one layer left over.
RAW |= {"layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"], "attention_bias": True}
RAW |= {"use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": False}
CONFIG = ModelConfig.from_hf(RAW, "config.json")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def params() -> transformer.Params:
    """Random values everywhere, biases and norms included."""
    random = np.random.default_rng(0)
    shapes = transformer.param_shapes(CONFIG)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape).astype(np.float32)), shapes)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    (directory / "config.json").write_text(json.dumps(RAW))
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def sharded(params: transformer.Params, source: Path, tmp_path: Path) -> Path:
    return save_pretrained(tmp_path / "sharded", CONFIG, params, source, max_shard_bytes=5000)


def same(a: transformer.Params, b: transformer.Params) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool(jnp.array_equal(x, y)), a, b))


def test_shards_hold_what_a_single_file_holds(
    params: transformer.Params, source: Path, sharded: Path, tmp_path: Path
) -> None:
    single = save_pretrained(tmp_path / "single", CONFIG, params, source)
    files = sorted(sharded.glob("*.safetensors"))
    index = json.loads((sharded / INDEX).read_text())
    assert [path.name for path in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 3
    together = {}
    for path in files:
        tensors = load_file(path)
        assert {index["weight_map"][name] for name in tensors} == {path.name}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 5000
        together |= tensors
    whole = load_file(single / "model.safetensors")
    assert whole.keys() == together.keys() == index["weight_map"].keys()
    assert all(np.array_equal(whole[name], together[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert not (single / INDEX).exists()
    assert same(load_params(sharded, CONFIG), load_params(single, CONFIG))
    assert same(load_params(sharded, CONFIG), params)


def test_an_export_in_another_number_of_files_leaves_none_behind(
    params: transformer.Params, source: Path, sharded: Path
) -> None:
    before = weights_fingerprint(sharded)
    save_pretrained(sharded, CONFIG, params, source)
    assert sorted(path.name for path in sharded.glob("model*")) == ["model.safetensors"]
    assert weights_fingerprint(sharded) != before


def test_transformers_loads_shards(sharded: Path, params: transformer.Params) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(sharded).eval()
    ids = np.arange(20)[None] % 41
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    h = transformer.hidden_states(CONFIG, params, ids, np.arange(20)[None])
    np.testing.assert_allclose(transformer.logits(CONFIG, params, h), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_every_stored_dtype_is_read_as_any_other(
    params: transformer.Params, source: Path, tmp_path: Path, dtype: type, wanted: str
) -> None:
    single = save_pretrained(tmp_path / "m", CONFIG, params, source)
    stored = {name: value.astype(dtype) for name, value in load_file(single / "model.safetensors").items()}
    save_file(stored, single / "model.safetensors")
    found = load_params(single, CONFIG, wanted)
    assert same(found, jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(dtype).astype(wanted)), params))


ON_DEVICES = """
import sys
from collections import Counter
from pathlib import Path
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from agentark_jax.models import transformer, weights
from agentark_jax.models.config import load_config

directory = Path(sys.argv[1])
config = load_config(directory)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
specs = {  # by rank: every kind of axis is cut somewhere: the stack, heads, half a head
    1: P(None), 2: P("tensor", "fsdp"), 3: P("data", "tensor", "fsdp"), 4: P(None, "tensor", "fsdp")
}
shapes = transformer.param_shapes(config)

def sharding(leaf):
    spec = [axis if axis and size % 2 == 0 else None for axis, size in zip(specs[leaf.ndim], leaf.shape)]
    return NamedSharding(mesh, P(*spec))

shardings = jax.tree.map(sharding, shapes)
read, original = Counter(), weights.Tensors._read

def counted(self, entry, shape, bounds):
    part = original(self, entry, shape, bounds)
    read[entry.name] += part.size
    return part

weights.Tensors._read = counted
placed = weights.load_params(directory, config, shardings=shardings)
weights.Tensors._read = original
assert sum(read.values()) == sum(leaf.size for leaf in jax.tree.leaves(shapes)), "each element is read once"
plain = weights.load_params(directory, config)
for (path, leaf), whole, wanted in zip(
    jax.tree.leaves_with_path(placed), jax.tree.leaves(plain), jax.tree.leaves(shardings), strict=True
):
    assert leaf.sharding == wanted, path
    assert np.array_equal(leaf, whole), path
split = [leaf for leaf in jax.tree.leaves(placed) if leaf.addressable_shards[0].data.size * 4 <= leaf.size]
assert len(split) > 10
target = weights.save_pretrained(directory.parent / "again", config, placed, directory, max_shard_bytes=5000)
assert weights.weights_fingerprint(target) == sys.argv[2]
"""


def test_each_device_gets_its_part_and_nothing_is_read_twice(sharded: Path, source: Path) -> None:
    """Eight devices in a process of its own; what they hold is then exported again."""
    save_pretrained(sharded, CONFIG, load_params(sharded, CONFIG), sharded, max_shard_bytes=5000)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_DEVICES, str(sharded), weights_fingerprint(sharded)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


# --- damage


def test_every_cut_shard_is_listed(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-10])
    second.write_bytes(b"")
    with pytest.raises(AgentArkError, match="cut short or damaged") as caught:
        load_params(sharded, CONFIG)
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)


def test_every_missing_shard_is_listed(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    first.unlink()
    second.unlink()
    with pytest.raises(UsageError, match=rf"{first.name}: not found, and with it {second.name}"):
        load_params(sharded, CONFIG)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file(load_file(second) | {"model.embed_tokens.weight": np.zeros((41, 16), np.float32)}, second)
    with pytest.raises(UsageError, match=rf"embed_tokens\.weight stands in {first.name} and in {second.name}"):
        load_params(sharded, CONFIG)


def test_a_tied_head_of_another_shape_is_refused(params: transformer.Params, source: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RAW | {"tie_word_embeddings": True}))
    tied = ModelConfig.from_hf(RAW | {"tie_word_embeddings": True}, "config.json")
    kept = {key: value for key, value in params.items() if key != "unembedding"}
    target = save_pretrained(tmp_path / "m", tied, kept, tmp_path)
    tensors = load_file(target / "model.safetensors")
    save_file(tensors | {"lm_head.weight": np.zeros((40, 16), np.float32)}, target / "model.safetensors")
    with pytest.raises(UsageError, match=r"misshaped lm_head\.weight in model\.safetensors: \(40, 16\)"):
        load_params(target, tied)
