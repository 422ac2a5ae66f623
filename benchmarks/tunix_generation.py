"""Tunix's side of generation: its vanilla `Sampler` on its Gemma 3, in fp32.

As its users call it, but that prompts are given as ids and no sequence stops early. Prompts are padded on the left to
the longest; the cache has exactly the room that is needed, and prefill makes logits of the last token alone, which is
what the sampler does when prompts are not echoed. Its two programs are compiled before anything is timed. `generate/`
has no other sampler that runs in this process and needs no server.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tunix.generate.sampler import CacheConfig, Sampler

from benchmarks.tunix_model import load
from benchmarks.workers import Repeat, Reply, serve

Setup = Mapping[str, Any]


class Ids:
    """What Tunix needs of a tokenizer: a "text" lists the ids of a prompt, what is generated is decoded."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._config = json.loads((directory / "config.json").read_text())

    def encode(self, text: str) -> list[int]:
        """Without the first id where that is the beginning of a sequence: the sampler puts it there itself."""
        ids = [int(each) for each in text.split()]
        if ids[0] != self.bos_id():
            raise ValueError("Tunix's sampler has no prompts without a beginning-of-sequence token")
        return ids[1:]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def bos_id(self) -> int:
        return int(self._config["bos_token_id"])

    def eos_id(self) -> int:
        return int(self._config["eos_token_id"])

    def pad_id(self) -> int:
        return int(self._config["pad_token_id"])


def build(setup: Setup) -> tuple[Repeat, Reply]:
    """Greedy, or several samples of each prompt from the whole distribution at temperature 1, as on our side."""
    prompts, wanted, samples = setup["prompts"], setup["new_tokens"], setup["samples"]
    texts = [" ".join(map(str, prompt)) for prompt in prompts for _ in range(samples)]
    longest, most = max(map(len, prompts)), max(wanted)
    config, model = load(Path(setup["model"]))
    cache = CacheConfig(longest + most, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = Sampler(model, Ids(Path(setup["model"])), cache)

    def generate(**drawing: Any) -> list[list[int]]:
        """No id is -1, so that nothing ends early. The batch runs until the longest has its tokens."""
        output = sampler(
            texts, max_generation_steps=most, max_prompt_length=longest, eos_tokens=[-1], seed=0, **drawing
        )
        return [row[:length].tolist() for row, length in zip(output.tokens, wanted, strict=True)]

    def repeat(index: int) -> Reply:
        started = time.perf_counter()
        rows = generate() if samples == 1 else generate(temperature=1.0, top_p=1.0)
        seconds = time.perf_counter() - started
        reply: Reply = {"seconds": seconds, "counts": [len(row) for row in rows]}
        if index == 0:
            reply["greedy"] = rows if samples == 1 else generate()[::samples]
        return reply

    return repeat, {"threads": os.cpu_count()}


if __name__ == "__main__":
    serve(build)
