"""`agentark logits` and `agentark generate`, through the command line."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models

from agentark_jax.cli import main
from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.models import transformer
from agentark_jax.models.config import load_config
from agentark_jax.models.weights import load_params

ROWS, LENGTH, POSITIONS = 2, 300, 320  # more positions than are scored at once


def write_model(directory: Path, vocabulary: int) -> Path:
    return tiny_models.write_model(directory, vocabulary, max_positions=POSITIONS)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every command sets JAX's cache for the whole process; afterwards it is what it was."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTARK_CACHE", str(directory))
        yield directory
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    train_tokenizer(["seven and five are twelve", "what is seven"], 290, directory)
    return write_model(directory, 320)  # 30 rows of padding after the tokenizer's last token


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 320, (ROWS, LENGTH)))
    return tmp_path / "ids.npy"


def run_logits(model: Path | str, ids: Path, out: Path, *more: str) -> int:
    return main(["logits", "--model", str(model), "--ids", str(ids), "--out", str(out), *more])


def test_logits_are_those_of_the_decoder(
    model: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "logits.npy"
    assert run_logits(model, ids, out) == 0
    assert str(out) in capsys.readouterr().out
    found, config, given = np.load(out), load_config(model), np.load(ids)
    assert (found.dtype, found.shape) == (np.float32, (ROWS, LENGTH, 320))
    params = load_params(model, config)
    h = transformer.hidden_states(config, params, given, np.broadcast_to(np.arange(LENGTH), given.shape))
    np.testing.assert_allclose(found, transformer.logits(config, params, h), rtol=1e-4, atol=1e-4)
    assert [path.name for path in out.parent.iterdir()] == ["logits.npy"]


def test_logits_in_bfloat16_are_near(model: Path, ids: Path, tmp_path: Path) -> None:
    assert run_logits(model, ids, tmp_path / "a.npy") == 0
    assert run_logits(model, ids, tmp_path / "b.npy", "--dtype", "bfloat16") == 0
    a, b = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert b.dtype == np.float32
    assert 0.98 < np.corrcoef(a.ravel(), b.ravel())[0, 1] < 1 - 1e-9


@pytest.mark.parametrize("command", ["logits", "generate"])
def test_compiled_programs_are_kept(model: Path, ids: Path, tmp_path: Path, cache: Path, command: str) -> None:
    jax.config.update("jax_compilation_cache_dir", None)
    assert (say(model) if command == "generate" else run_logits(model, ids, tmp_path / "out.npy")) == 0
    assert jax.config.jax_compilation_cache_dir == str(cache / "compiled")


def test_logits_need_no_tokenizer(ids: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    assert run_logits(write_model(tmp_path / "bare", 320), ids, tmp_path / "out.npy") == 0


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 3), 320), r"row 0, position 0 is 320; ids of this model are 0 to 319\. 6 of 6 lie outside"),
        (np.array([[0, 1], [2, -1]]), "row 1, position 1 is -1"),
        (np.zeros((1, POSITIONS + 1), np.int64), "rows of 321 ids; this model takes at most 320"),
        (np.zeros(5, np.int64), r"holds int64 \[5\]"),
        (np.zeros((2, 2, 2), np.int32), r"holds int32 \[2, 2, 2\]"),
        (np.zeros((2, 3)), r"holds float64 \[2, 3\]"),
        (np.zeros((0, 3), np.int32), "a non-empty array"),
        (np.array([[None]]), "not a readable .npy file"),
    ],
)
def test_unusable_ids(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "ids.npy", array)
    assert run_logits(model, tmp_path / "ids.npy", tmp_path / "out.npy") == 2
    assert_says(capsys, message)
    assert not (tmp_path / "out.npy").exists()


def assert_says(capsys: pytest.CaptureFixture[str], message: str) -> None:
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert "Traceback" not in told


def test_unusable_files(model: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.npy"
    assert run_logits(model, tmp_path / "none.npy", out) == 2
    assert_says(capsys, r"none\.npy: not a readable .npy file")
    (tmp_path / "text.npy").write_text("1 2 3")
    assert run_logits(model, tmp_path / "text.npy", out) == 2
    assert_says(capsys, r"text\.npy: not a readable .npy file")
    assert run_logits("./no/model", ids, out) == 2
    assert_says(capsys, "no such directory")
    assert run_logits(model, ids, ids / "below" / "out.npy") == 1
    assert_says(capsys, "cannot be written")
    assert run_logits(model, ids, out, "--dtype", "int8") == 2
    assert_says(capsys, "invalid choice: 'int8'")
    assert main(["logits", "--model", str(model)]) == 2
    assert_says(capsys, "required: --ids, --out.*agentark logits --help")


def test_a_failed_run_leaves_an_older_result(ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m").mkdir()
    broken = write_model(tmp_path / "m", 320)
    (broken / "model.safetensors").write_bytes(b"cut short")
    (tmp_path / "out.npy").write_text("older")
    assert run_logits(broken, ids, tmp_path / "out.npy") == 1
    assert_says(capsys, "not a readable safetensors file")
    assert (tmp_path / "out.npy").read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "m", "out.npy"]


def say(model: Path, *more: str) -> int:
    return main(["generate", "--model", str(model), "--prompt", "what is seven", "--max_tokens", "12", *more])


def test_greedy_text_is_that_of_the_decoder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert say(model, "--temperature", "0") == 0
    captured = capsys.readouterr()
    config, tokenizer = load_config(model), Tokenizer(model)
    params, ids = load_params(model, config), [2, *tokenizer.encode("what is seven")]
    start, jitted = len(ids), jax.jit(transformer.hidden_states, static_argnums=0)
    while len(ids) < start + 12 and ids[-1] != tokenizer.eos_id:
        padded = np.pad(ids, (0, 60 - len(ids)))[None]
        h = jitted(config, params, padded, np.arange(60)[None])
        ids.append(int(np.argmax(transformer.logits(config, params, h)[0, len(ids) - 1])))
    assert captured.out.strip() == tokenizer.decode(ids[start:]).strip()
    assert captured.out.strip()
    assert f"[{len(ids) - start} tokens, ended by" in captured.err


def test_samples_follow_the_seed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for more in (["--samples", "3", "--seed", "7"], ["--samples", "2", "--seed", "8"]):
        assert say(model, "--top_p", "0.9", *more) == 0
        texts.append(capsys.readouterr().out)
    first, second = ([part.split("\n", 1)[1] for part in text.split("--- ")[1:]] for text in texts)
    assert first[1:] == second
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_tokens", "0"], "--max_tokens is 0: it must be at least 1"),
        (["--max_tokens", "318"], "exceeds the model's 320 positions"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--top_p", "0"], r"--top_p is 0\.0: it must be above 0"),
        (["--samples", "0"], "--samples is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--prompt", "\udcff"], "--prompt is not UTF-8"),
        (["--max-tokens", "3"], "unrecognized arguments: --max-tokens 3"),
    ],
)
def test_unusable_requests(model: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    assert say(model, *more) == 2
    assert_says(capsys, message)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(["seven and five are twelve"], 280, tmp_path)
    size = Tokenizer(tmp_path).vocabulary_size
    write_model(tmp_path, size - 1)
    assert say(tmp_path) == 2
    assert_says(capsys, rf"its ids reach {size - 1}, but .*config\.json says vocab_size {size - 1}")


@pytest.mark.parametrize(("command", "taught"), [("logits", "--ids"), ("generate", "--temperature")])
def test_help_teaches_without_waiting_for_jax(command: str, taught: str) -> None:
    code = f"import sys; from agentark_jax.cli import main\ntry: main(['{command}', '--help'])\n"
    code += "finally: assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert taught in done.stdout
    assert f"agentark {command} --model" in done.stdout
