"""Weights in and out: safetensors in Hugging Face format to stacked parameters and back.

One table (`tensor_table`) names, for every tensor of a checkpoint, where it lives in the parameter tree and which of
its axes are heads; loading and saving both read it, so they cannot disagree.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.config import ModelConfig, read_json
from agentark_jax.models.transformer import Params, param_shapes

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# What stands beside the weights and travels with them.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Entry:
    """One tensor: its Hugging Face `name`, its `path` and `repeat` (index into the stack, None: unstacked) in the tree.

    `heads` is the first of the two axes (heads, head size) of the tree's array that are one axis in the file.
    """

    name: str
    path: tuple[str, ...]
    repeat: int | None = None
    heads: int | None = None

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape in the file, from the shape of its array in the tree."""
        shape = shape if self.repeat is None else shape[1:]
        if self.heads is None:
            return shape
        return (*shape[: self.heads], shape[self.heads] * shape[self.heads + 1], *shape[self.heads + 2 :])


def tensor_table(config: ModelConfig) -> list[Entry]:
    """Every tensor of a checkpoint of this model."""
    layer: list[tuple[str, tuple[str, ...], int | None]] = [
        ("input_layernorm.weight", ("attention_norm", "weight"), None),
        ("self_attn.q_proj.weight", ("attention", "query"), 0),
        ("self_attn.k_proj.weight", ("attention", "key"), 0),
        ("self_attn.v_proj.weight", ("attention", "value"), 0),
        ("self_attn.o_proj.weight", ("attention", "output"), 1),
        ("mlp.gate_proj.weight", ("mlp", "gate"), None),
        ("mlp.up_proj.weight", ("mlp", "up"), None),
        ("mlp.down_proj.weight", ("mlp", "down"), None),
    ]
    if config.sandwich_norms:
        layer += [
            ("post_attention_layernorm.weight", ("post_attention_norm", "weight"), None),
            ("pre_feedforward_layernorm.weight", ("mlp_norm", "weight"), None),
            ("post_feedforward_layernorm.weight", ("post_mlp_norm", "weight"), None),
        ]
    else:
        layer.append(("post_attention_layernorm.weight", ("mlp_norm", "weight"), None))
    if config.qk_norm:
        layer.append(("self_attn.q_norm.weight", ("attention", "query_norm", "weight"), None))
        layer.append(("self_attn.k_norm.weight", ("attention", "key_norm", "weight"), None))
    if config.attention_bias:
        for letter, long in (("q", "query"), ("k", "key"), ("v", "value")):
            layer.append((f"self_attn.{letter}_proj.bias", ("attention", f"{long}_bias"), 0))
    if config.attention_output_bias:
        layer.append(("self_attn.o_proj.bias", ("attention", "output_bias"), None))
    if config.mlp_bias:
        layer += [(f"mlp.{name}_proj.bias", ("mlp", f"{name}_bias"), None) for name in ("gate", "up", "down")]
    table = [Entry("model.embed_tokens.weight", ("embedding",))]
    for index in range(config.num_layers):
        repeat, offset = divmod(index, config.period)
        stacked = repeat < config.num_periods
        root = ("scanned" if stacked else "rest", f"{offset:02d}")
        for name, path, heads in layer:
            entry = Entry(f"model.layers.{index}.{name}", root + path, repeat if stacked else None, heads)
            table.append(entry)
    table.append(Entry("model.norm.weight", ("final_norm", "weight")))
    if not config.tie_embeddings:
        table.append(Entry("lm_head.weight", ("unembedding",)))
    return table


def _leaf(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _shapes_by_path(tree: Params) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)}


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def safetensors_files(directory: Path) -> list[Path]:
    """The weight files of a model directory, sharded or single. Raises UsageError naming the one that is missing."""
    directory = Path(directory)
    index = directory / _INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UsageError(f"{index}: key weight_map: missing or empty; restore the file from its source")
        names = sorted({str(name) for name in weight_map.values()})
    else:
        names = [_SINGLE]
    for name in names:
        if Path(name).name != name:
            raise UsageError(f"{index}: key weight_map: {name!r} is not a plain file name; restore it from its source")
        if not (directory / name).is_file():
            raise UsageError(f"{directory / name}: not found; a model directory needs its safetensors files")
    return [directory / name for name in names]


def load_params(directory: Path, config: ModelConfig, dtype: str = "float32") -> Params:
    """Stacked parameters (JAX arrays of `dtype`: float32, bfloat16, float16) from a model directory.

    Raises UsageError listing every missing, unexpected and misshaped tensor with its file, AgentArkError for a file
    that cannot be read. A tied model's redundant `lm_head.weight` is allowed when it equals the embedding.
    """
    wanted, directory = _dtype(dtype), Path(directory)
    shapes, table = param_shapes(config), tensor_table(config)
    with ExitStack() as stack:
        where: dict[str, tuple[Path, Any]] = {}
        for path in safetensors_files(directory):
            try:
                handle = stack.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise AgentArkError(f"{path}: not a readable safetensors file ({error}); fetch it again") from error
            where.update(dict.fromkeys(handle.keys(), (path, handle)))
        _check_tensors(directory, config, table, shapes, where)
        params: Params = {}
        by_path: dict[tuple[str, ...], list[Entry]] = {}
        for entry in table:
            by_path.setdefault(entry.path, []).append(entry)
        for path_in_tree, entries in by_path.items():
            shape = tuple(_leaf(shapes, path_in_tree).shape)
            read = [where[entry.name][1].get_tensor(entry.name) for entry in entries]
            array = read[0] if entries[0].repeat is None else np.stack(read)
            _set(params, path_in_tree, jnp.asarray(array.reshape(shape).astype(wanted, copy=False)))
            del read, array
        if config.tie_embeddings and "lm_head.weight" in where:
            path, handle = where["lm_head.weight"]
            embedding = where["model.embed_tokens.weight"][1].get_tensor("model.embed_tokens.weight")
            if not np.array_equal(handle.get_tensor("lm_head.weight"), embedding):
                raise UsageError(
                    f"{path}: lm_head.weight differs from model.embed_tokens.weight although config.json ties them; "
                    "set tie_word_embeddings to false"
                )
    return params


def _check_tensors(
    directory: Path,
    config: ModelConfig,
    table: Iterable[Entry],
    shapes: Params,
    where: Mapping[str, tuple[Path, Any]],
) -> None:
    problems, expected = [], set()
    for entry in table:
        expected.add(entry.name)
        if entry.name not in where:
            problems.append(f"missing {entry.name}")
            continue
        path, handle = where[entry.name]
        shape = entry.file_shape(tuple(_leaf(shapes, entry.path).shape))
        tensor = handle.get_slice(entry.name)
        if tuple(tensor.get_shape()) != shape:
            problems.append(f"misshaped {entry.name} in {path.name}: {tuple(tensor.get_shape())}, expected {shape}")
        elif tensor.get_dtype() not in ("F32", "BF16", "F16"):
            problems.append(f"{entry.name} in {path.name} has dtype {tensor.get_dtype()}, not F32, BF16 or F16")
    if config.tie_embeddings:
        expected.add("lm_head.weight")
    problems += [f"unexpected {name} in {where[name][0].name}" for name in sorted(set(where) - expected)]
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise UsageError(f"{directory}: its tensors do not match its config.json: {shown}. Fetch the model again")


def _dtype(name: str) -> np.dtype:
    if name not in _DTYPES:
        raise UsageError(f"dtype is {name!r}; supported are {sorted(_DTYPES)}")
    return _DTYPES[name]


def save_pretrained(
    directory: Path, config: ModelConfig, params: Params, source_dir: Path, dtype: str = "float32"
) -> Path:
    """Write stacked `params` as a model directory that transformers loads; it appears only when it is complete.

    config.json (with `dtype`), tokenizer files and generation_config.json come from `source_dir`. An existing
    directory is replaced. Raises AgentArkError when the disk is full or not writable, UsageError when `params` do not
    fit `config`.
    """
    wanted, directory, source_dir = _dtype(dtype), Path(directory), Path(source_dir)
    found, expected = _shapes_by_path(params), _shapes_by_path(param_shapes(config))
    if found != expected:
        wrong = sorted(dict(found.items() ^ expected.items()))
        raise UsageError(
            f"{directory}: the parameters do not fit the config: {wrong[:12]}; pass the model's own config"
        )
    raw = dict(read_json(source_dir / "config.json"))
    raw.pop("torch_dtype", None)  # the spelling of transformers 4
    raw["dtype"] = dtype
    host = jax.tree.map(np.asarray, params)
    tensors = {}
    for entry in tensor_table(config):
        array = _leaf(host, entry.path)
        part = array if entry.repeat is None else array[entry.repeat]
        tensors[entry.name] = part.reshape(entry.file_shape(array.shape)).astype(wanted, copy=False)
    with replaced_directory(directory) as fresh:
        save_file(tensors, fresh / _SINGLE, metadata={"format": "pt"})
        (fresh / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        for name in (*_COMPANIONS, "generation_config.json"):
            if (source_dir / name).is_file():
                shutil.copyfile(source_dir / name, fresh / name)
        if not (fresh / "generation_config.json").exists():
            write_generation_config(fresh, config)
    return directory


def write_generation_config(directory: Path, config: ModelConfig) -> None:
    """A generation_config.json with the special token ids of `config`."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    known = {key: value for key, value in ids.items() if value is not None}
    (directory / "generation_config.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


class replaced_directory:
    """Context manager: a fresh directory beside `target` that takes its place when the block ends well.

    On an error it is removed and `target` is untouched; a system error (full disk, no permission) becomes an
    AgentArkError that names `target`.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(target)

    def __enter__(self) -> Path:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.fresh = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", dir=self.target.parent))
        except OSError as error:
            raise self._failure(error) from error
        return self.fresh

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            try:
                self._swap()
                return
            except OSError as failure:
                shutil.rmtree(self.fresh, ignore_errors=True)
                raise self._failure(failure) from failure
        shutil.rmtree(self.fresh, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise self._failure(error) from error

    def _swap(self) -> None:
        for path in self.fresh.iterdir():
            path.chmod(0o644)  # mkdtemp and safetensors make theirs private
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self.fresh.chmod(0o755)
        if self.target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.old.", dir=self.target.parent))
            os.replace(self.target, old / "it")
            os.replace(self.fresh, self.target)
            shutil.rmtree(old)
        else:
            os.replace(self.fresh, self.target)

    def _failure(self, error: BaseException) -> AgentArkError:
        return AgentArkError(f"{self.target}: cannot be written ({error}); free disk space or choose another directory")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hex, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_fingerprint(directory: Path) -> str:
    """Identity of a model directory: a hash (24 hex digits) of its config, weight files and tokenizer.json."""
    directory = Path(directory)
    paths = [directory / "config.json", *safetensors_files(directory), directory / "tokenizer.json"]
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise UsageError(f"{path}: not found; a model directory needs it")
        digest.update(f"{path.name}:{file_sha256(path)}\n".encode())
    return digest.hexdigest()[:24]
