"""A thin view of a `tokenizer.json`: text to ids and back, with the ids of its special tokens."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from agentark_jax.errors import UsageError

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")


class Tokenizer:
    """The tokenizer of a model directory in Hugging Face format.

    `hash` identifies the file: ids are reused verbatim only between models whose tokenizer hashes agree.
    """

    def __init__(self, directory: Path):
        path = directory / "tokenizer.json"
        try:
            content = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except FileNotFoundError:
            raise UsageError(f"{path}: not found. A model directory needs its tokenizer.json.") from None
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise UsageError(f"{path}: not a readable tokenizer file ({error}). Fetch the model again.") from error
        self.hash = hashlib.sha256(content).hexdigest()[:24]
        self.vocabulary_size = self._tokenizer.get_vocab_size()
        self.bos_id = self._special(directory, "bos_token")
        eos_id = self._special(directory, "eos_token")
        if eos_id is None:
            raise UsageError(f"{directory / 'tokenizer_config.json'}: no eos_token, so a completion could never end.")
        self.eos_id: int = eos_id

    def _special(self, directory: Path, name: str) -> int | None:
        path = directory / "tokenizer_config.json"
        try:
            token = json.loads(path.read_text()).get(name)
        except FileNotFoundError:
            raise UsageError(f"{path}: not found. It names the model's {name}.") from None
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}: not valid JSON ({error}).") from error
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            return None
        token_id: int | None = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise UsageError(f"{path}: {name} is {token!r}, which tokenizer.json does not contain.")
        return token_id

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, without special tokens."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, directory: Path) -> None:
    """Train a byte-level BPE tokenizer and write it as `tokenizer.json` and `tokenizer_config.json`.

    Digits are separate tokens, as in Gemma and Qwen3, so that arithmetic does not depend on how numbers merge.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    pad, eos, bos, unk = SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unk,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
