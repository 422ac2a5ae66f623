"""`agentark logits` and `agentark generate`: one model by itself, to check it against any reference or just to read it.

What a command needs of JAX is imported only once its arguments are known to be good, so that --help is immediate.
"""

import argparse
import asyncio
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from agentark_jax.errors import UsageError, memory_for
from agentark_jax.files import atomic_path

_MODEL = "a directory in Hugging Face format, a hub id such as Qwen/Qwen3-0.6B, or gguf:gemma3-270m"
_POSITIONS = 256  # whose logits are on the device at once

_LOGITS = """\
Write the logits of every position of every row of ids.

The ids are an integer array [B, T] made with numpy.save, without padding; the logits become a float32 array [B, T, V],
after the model's soft cap where it has one. OUT appears when it is complete and takes 4·B·T·V bytes. The directory
needs no tokenizer. Compare with any other implementation:

  python -c "import numpy; numpy.save('ids.npy', numpy.arange(64).reshape(2, 32))"
  agentark logits --model DIR --ids ids.npy --out ours.npy
  python -c "import numpy; print(abs(numpy.load('ours.npy') - numpy.load('theirs.npy')).max())"
"""
_GENERATE = """\
Print what a model says after a text.

The text goes in as it is, after the tokenizer's beginning-of-text token where it has one: no chat template is applied.
The same arguments give the same text again; sample i is drawn with seed SEED + i, however many there are.

  agentark generate --model gguf:gemma3-270m --prompt "Question: What is 7 + 5?" --temperature 0
  agentark generate --model runs/quickstart/model --prompt "Question: What is 7 + 5?" --samples 4
"""


class Parser(argparse.ArgumentParser):
    """Arguments of a tool; wrong ones raise UsageError."""

    def __init__(self, prog: str, description: str) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. `{self.prog} --help` lists the options.")


@memory_for("logits", "Give shorter rows of ids, or --dtype bfloat16")
def logits(arguments: Sequence[str]) -> None:
    """`agentark logits`. Raises UsageError for ids or a model that cannot be used, before the weights are read."""
    parser = Parser("agentark logits", _LOGITS)
    parser.add_argument("--model", required=True, help=_MODEL)
    parser.add_argument("--ids", required=True, type=Path, help="token ids, integers [B, T] (.npy)")
    parser.add_argument("--out", required=True, type=Path, help="where to write the logits, float32 [B, T, V] (.npy)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="the dtype of weights and computation (default: %(default)s); norms and softmax stay in float32",
    )
    options = parser.parse_args(arguments)
    ids = _read_ids(options.ids)

    import jax

    from agentark_jax.cache import enable_compilation_cache
    from agentark_jax.models import transformer
    from agentark_jax.models.config import load_config
    from agentark_jax.models.gguf import resolve_model
    from agentark_jax.models.weights import load_params

    enable_compilation_cache()
    directory = resolve_model(options.model, tokenizer=False)
    config = load_config(directory)
    _check_ids(options.ids, ids, config.vocab_size, config.max_positions)
    shape = (*ids.shape, config.vocab_size)
    with atomic_path(options.out) as temporary:
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        params = load_params(directory, config, options.dtype)
        hidden = jax.jit(transformer.hidden_states, static_argnums=0)
        score = jax.jit(transformer.logits, static_argnums=0)
        positions = np.arange(ids.shape[1], dtype=np.int32)[None]
        for row in range(ids.shape[0]):
            h = hidden(config, params, ids[row : row + 1].astype(np.int32), positions)
            for start in range(0, ids.shape[1], _POSITIONS):
                part = slice(start, start + _POSITIONS)
                out[row, part] = score(config, params, h[0, part])
        out.flush()
    print(f"{options.out}: float32 {list(shape)}, computed in {options.dtype}")


def _read_ids(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"--ids {path}: not a readable .npy file ({error}); make it with numpy.save") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.size == 0:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive of arrays"
        raise UsageError(f"--ids {path}: holds {found}; a non-empty array of integers [B, T] is needed")
    return ids


def _check_ids(path: Path, ids: np.ndarray, vocabulary: int, positions: int) -> None:
    wrong = np.argwhere((ids < 0) | (ids >= vocabulary))
    if len(wrong):
        row, position = wrong[0]
        raise UsageError(
            f"--ids {path}: row {row}, position {position} is {ids[row, position]}; ids of this model are 0 to "
            f"{vocabulary - 1}. {len(wrong)} of {ids.size} lie outside"
        )
    if ids.shape[1] > positions:
        raise UsageError(
            f"--ids {path}: rows of {ids.shape[1]} ids; this model takes at most {positions}. Shorten them"
        )


@memory_for("generate", "Lower --max_tokens or --samples")
def generate(arguments: Sequence[str]) -> None:
    """`agentark generate`. Raises UsageError for arguments or a model that cannot be used."""
    parser = Parser("agentark generate", _GENERATE)
    parser.add_argument("--model", required=True, help=_MODEL)
    parser.add_argument("--prompt", required=True, help="the text to go on from")
    parser.add_argument("--max_tokens", type=int, default=128, help="longest completion (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="draw from the fewest tokens whose probability reaches this (default: %(default)s, all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first sample (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="how many completions (default: %(default)s)")
    options = parser.parse_args(arguments)
    _check_sampling(options)

    from agentark_jax.cache import enable_compilation_cache
    from agentark_jax.data.tokenizer import Tokenizer
    from agentark_jax.engines.base import Request
    from agentark_jax.engines.config import EngineConfig
    from agentark_jax.engines.local import LocalEngine
    from agentark_jax.models.config import load_config
    from agentark_jax.models.gguf import resolve_model
    from agentark_jax.models.weights import load_params
    from agentark_jax.records import Completion, Sampling

    enable_compilation_cache()
    directory = resolve_model(options.model)
    config = load_config(directory)
    tokenizer = Tokenizer(directory, config.vocab_size)
    beginning = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    prompt = np.asarray(beginning + tokenizer.encode(options.prompt), np.int32)
    context = len(prompt) + options.max_tokens
    if len(prompt) == 0:
        raise UsageError("--prompt is empty, and this tokenizer has no beginning-of-text token: give some text")
    if context > config.max_positions:
        raise UsageError(
            f"--max_tokens {options.max_tokens} after a prompt of {len(prompt)} tokens exceeds the model's "
            f"{config.max_positions} positions: shorten one of them"
        )
    stop_ids = tuple(dict.fromkeys((tokenizer.eos_id, *config.eos_token_ids)))
    engine = LocalEngine(
        EngineConfig(slots=min(options.samples, 16)),
        config,
        load_params(directory, config),
        tokenizer,
        context=context,
        model=options.model,
        weights="as loaded",
    )

    async def draw() -> list[Completion]:
        samplings = [
            Sampling(options.temperature, options.max_tokens, stop_ids, options.seed + i, options.top_p)
            for i in range(options.samples)
        ]
        return await asyncio.gather(*(engine.generate(Request(prompt, sampling)) for sampling in samplings))

    for number, completion in enumerate(asyncio.run(draw()), start=1):
        if options.samples > 1:
            print(f"--- {number} of {options.samples}", flush=True)
        print(completion.text, flush=True)
        print(f"[{len(completion.ids)} tokens, ended by {completion.finish}]", file=sys.stderr, flush=True)


def _check_sampling(options: Any) -> None:
    """The engine takes these for granted."""
    rules = {
        "max_tokens": (options.max_tokens >= 1, "at least 1"),
        "temperature": (0 <= options.temperature < math.inf, "0 or more"),
        "top_p": (0 < options.top_p <= 1, "above 0 and at most 1"),
        "seed": (0 <= options.seed < 2**63, "between 0 and 2^63"),
        "samples": (options.samples >= 1, "at least 1"),
    }
    for key, (good, rule) in rules.items():
        if not good:
            raise UsageError(f"--{key} is {getattr(options, key)}: it must be {rule}.")
    try:
        options.prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"--prompt is not UTF-8 ({error.reason} at character {error.start}).") from error
