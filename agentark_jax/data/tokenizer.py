"""A thin view of a `tokenizer.json`: text to ids and back, with the ids of its special tokens."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from agentark_jax.errors import AgentArkError, UsageError

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
# How byte-level tokens spell bytes (GPT-2's alphabet): those that are seen in print as Latin-1, the others from U+0100.
_BYTES = {chr(byte): byte for byte in _PRINTED}
_BYTES |= {chr(0x100 + place): byte for place, byte in enumerate(sorted(set(range(0x100)).difference(_PRINTED)))}
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The tokenizer of a model directory in Hugging Face format.

    `hash` identifies the file: ids are reused verbatim only between models whose tokenizer hashes agree.
    `special_tokens` are the named tokens of `tokenizer_config.json` (`eos_token`: `</s>` …).

    Args:
        embeddings: rows of the model's embedding, checked where given. More rows than tokens are padding (`unused_rows`
            says how many); an added token beyond the last row (Gemma 3's image token in its text-only models) is one
            that no text may contain.

    Raises:
        UsageError: a file that is missing or malformed, no `eos_token`, or ordinary tokens beyond the embedding.
    """

    def __init__(self, directory: Path, embeddings: int | None = None):
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
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = _special_tokens(directory / "tokenizer_config.json")
        self.bos_id = self._special(directory, "bos_token")
        eos_id = self._special(directory, "eos_token")
        if eos_id is None:
            raise UsageError(
                f"{directory / 'tokenizer_config.json'}: no eos_token, so a completion could never end. "
                "Name the model's end token there."
            )
        self.eos_id: int = eos_id
        self.unused_rows = 0
        self._without_row: set[int] = set()
        if embeddings is not None:
            self._compare(embeddings, directory)

    def _special(self, directory: Path, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        token_id = self.token_id(token)
        if token_id is None:
            path = directory / "tokenizer_config.json"
            raise UsageError(f"{path}: {name} is {token!r}, which tokenizer.json does not contain.")
        return token_id

    def _compare(self, embeddings: int, directory: Path) -> None:
        ordinary = int(self.ordinary_ids.max(initial=0))
        if ordinary >= embeddings:
            raise UsageError(
                f"{directory / 'tokenizer.json'}: its ids reach {ordinary}, but {directory / 'config.json'} says "
                f"vocab_size {embeddings}: the tokenizer is not this model's. Put the model's own tokenizer there."
            )
        self._without_row = {token for token in self._added if token >= embeddings}
        self.unused_rows = max(0, embeddings - 1 - max(ordinary, *self._added, 0))

    def token_id(self, token: str) -> int | None:
        """The id of one token by its spelling, None where there is no such token."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def has(self, token_id: int) -> bool:
        """Whether the id is that of a token."""
        return self._tokenizer.id_to_token(token_id) is not None

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """The ids of all tokens but the added ones, ascending."""
        ordinary = set(self._tokenizer.get_vocab(with_added_tokens=False).values()) - self._added.keys()
        return np.asarray(sorted(ordinary), np.int32)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, which `decode` leaves out."""
        return token_id in self._added and self._added[token_id].special

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        content: str = self._tokenizer.to_str()
        return content

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text of ours; special tokens are those that it spells, none are added.

        Raises AgentArkError for a text that spells a token without an embedding.
        """
        return self._with_rows(self._ids(self._tokenizer, text))

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that others wrote: a control token that it spells is text, and ends no turn.

        Where it spells none they are those of `encode`. Raises as that.
        """
        ids = self._ids(self._tokenizer, text)
        return self._with_rows(self._ids(self._of_text, text) if self._controls(ids) else ids)

    def spells_control(self, text: str) -> bool:
        """Whether control tokens are among those that a text spells."""
        return self._controls(self._ids(self._tokenizer, text))

    def _controls(self, ids: tuple[int, ...]) -> bool:
        return any(map(self.is_special, ids))

    @cached_property
    def _of_text(self) -> tokenizers.Tokenizer:
        """The tokenizer without an eye for control tokens; seldom needed, and large."""
        found = tokenizers.Tokenizer.from_str(self.to_json())
        found.encode_special_tokens = True
        return found

    @staticmethod
    def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    def _with_rows(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if not self._without_row.isdisjoint(ids):
            token = self._added[next(token for token in ids if token in self._without_row)].content
            raise AgentArkError(f"a text contains {token!r}, a token that the model has no embedding for: remove it.")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def spell(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens spelled out."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """What each token adds to the text in UTF-8: joined, and bytes that are none replaced, they are `decode(ids)`.

        A control token adds nothing, and a token may add a part of a character. A blank that decoding leaves out where
        a text begins is left out of its token.

        Raises AgentArkError where what a token adds depends on more than that (as in CTC's decoding).
        """
        ids = [int(token) for token in ids]
        known = {token: self._tokenizer.id_to_token(token) for token in set(ids) if not self.is_special(token)}
        strings: dict[int, str] = {token: string for token, string in known.items() if string is not None}
        of_token = {token: self._piece(string) for token, string in strings.items()}
        pieces = [of_token.get(token, b"") for token in ids]
        if self._has_byte_tokens:
            kept = [place for place, token in enumerate(ids) if token in strings]
            for are_bytes, run in groupby(kept, lambda place: bool(_BYTE_TOKEN.fullmatch(strings[ids[place]]))):
                places = list(run)
                if are_bytes and not _is_text(b"".join(pieces[place] for place in places)):
                    for place in places:  # of a run with a wrong byte, all of them are replaced
                        pieces[place] = "\ufffd".encode()
        joined, text = b"".join(pieces).decode(errors="replace"), self.decode(ids)
        blank = joined.removesuffix(text)
        if blank + text != joined or blank.strip():
            raise AgentArkError(
                "tokenizer.json: its decoder makes text that cannot be traced to single tokens. Take a model whose "
                "decoder is ByteLevel, Metaspace, WordPiece, or made of Replace, ByteFallback, Fuse and Strip."
            )
        surplus = len(blank.encode())
        for place, piece in enumerate(pieces):
            if not surplus:
                break
            pieces[place] = piece[surplus:]
            surplus -= len(piece) - len(pieces[place])
        return pieces

    def _piece(self, string: str) -> bytes:
        if self._is_byte_level:
            return bytes(map(_BYTES.__getitem__, string)) if _BYTES.keys() >= set(string) else string.encode()
        byte = _BYTE_TOKEN.fullmatch(string) if self._has_byte_tokens else None
        # After another token, as decoders treat the first one of a text differently.
        return bytes([int(byte[1], 16)]) if byte else self._join(["a", string])[1:].encode()

    def _join(self, strings: list[str]) -> str:
        """The text of tokens by their spellings."""
        decoder = self._tokenizer.decoder
        return " ".join(strings) if decoder is None else decoder.decode(strings)

    @cached_property
    def _is_byte_level(self) -> bool:
        return self._join(["Ġ"]) == " "

    @cached_property
    def _has_byte_tokens(self) -> bool:
        return self._join(["<0x41>"]) == "A"


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _special_tokens(path: Path) -> dict[str, str]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: not found. It names the model's special tokens.") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: not valid JSON ({error}).") from error
    named = {key: config[key] for key in _NAMED if config.get(key) is not None}
    return {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}


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
