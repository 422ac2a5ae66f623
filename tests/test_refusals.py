"""What `agentark run` cannot carry out is one message naming place and fix, before a stage trains or generates."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny_models import write_model

from agentark_jax.checks import check_lengths
from agentark_jax.cli import main
from agentark_jax.config import RunConfig, WarmStartConfig
from agentark_jax.data.chat import make_format
from agentark_jax.data.config import PromptConfig
from agentark_jax.data.render import Layout
from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.errors import UsageError
from agentark_jax.generation import Model, Seat
from agentark_jax.models.config import load_config
from agentark_jax.protocols.config import DebateConfig
from agentark_jax.protocols.single import HINT
from agentark_jax.protocols.table import CLOSING
from agentark_jax.records import Question
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems
from agentark_jax.training.config import FitConfig

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A run sets JAX's cache for the whole process; afterwards it is what it was."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTARK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 40 rows of padding after the last token, as Qwen's have."""
    directory = tmp_path_factory.mktemp("good")
    questions = WordProblems(TaskConfig()).questions("warm_start", 200)
    train_tokenizer([text for question in questions for text in (question.prompt, question.rationale)], 400, directory)
    return write_model(directory, Tokenizer(directory).vocabulary_size + 40, max_positions=512)


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs with these arguments: the message of the refusal."""

    def run(model: Path | str, *arguments: str, code: int = 2) -> str:
        root = tmp_path / "runs"
        where = ["--config", str(TINY), "--root", str(root), "--model.source", str(model)]
        assert main(["run", *where, *arguments]) == code
        message = capsys.readouterr().err
        assert "Traceback" not in message
        finished = {path.parent.name for path in root.rglob("manifest.json")}
        assert finished <= {"raw_model", "questions", "prm_model"}
        return message

    return run


def test_a_judge_must_read_what_the_student_says(good, refused, tmp_path):
    """In the same ids, asked in the same words; what does not is refused before anything is computed."""
    larger = changed(good, tmp_path / "larger")
    write_model(larger, Tokenizer(good).vocabulary_size, hidden_size=64, max_positions=512)
    texts = [question.prompt for question in WordProblems(TaskConfig()).questions("warm_start", 50)]
    other = shutil.copytree(larger, tmp_path / "other")
    train_tokenizer(texts, 300, other)
    template = shutil.copytree(larger, tmp_path / "template")
    (template / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    short = changed(larger, tmp_path / "short", max_position_embeddings=256)
    arms = ("--arms", "[pad]")
    message = refused(good, *arms, "--prm.model", str(other))
    hashes = [Tokenizer(each).hash for each in (other, good)]
    assert f"prm.model: {other} has other tokenizer ({hashes[0]}) than model.source {good} ({hashes[1]})" in message
    assert f"prm.model: {template} has other prompts" in refused(good, *arms, "--prm.model", str(template))
    assert "no such directory" in refused(good, *arms, "--prm.model", str(tmp_path / "none"))
    message = refused(good, *arms, "--prm.model", str(short), "--prm.frozen.row_length", "512")
    assert f"prm.frozen.row_length: 512 tokens, but {short / 'config.json'} has 256 positions" in message


def changed(good: Path, directory: Path, **change: Any) -> Path:
    """The good model with another config."""
    shutil.copytree(good, directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return directory


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fit.row_length", "1024"], "fit.row_length: 1024 tokens, but"),
        (["--warm_start.answer.row_length", "1024"], "warm_start.answer.row_length: 1024 tokens, but"),
        (["--warm_start.revision.row_length", "1024"], "config.json has 512 positions; shorten the rows"),
        (["--fit.freeze", "[embed]"], "fit.freeze: no parameter is called 'embed'; choose among embedding"),
        (["--fit.mesh.data", "3"], "fit.mesh: data 3 × fsdp -1 × tensor 1 does not make up the"),
        (["--fit.row_length", "32"], "fit.row_length is 32, but an example can take"),
        (
            ["--debate.max_tokens", "500", "--fit.row_length", "2048", "--warm_start.revision.row_length", "4096"],
            "the model takes 512 tokens, but a call of a debate, without what it quotes, can take",
        ),
        (["--questions.validation", "0"], "warm_start.answer.eval_every is 60: set questions.validation too"),
        (["--select.variant", "dialogue"], "select.variant is dialogue and control is among arms"),
        (
            ["--select.variant", "dialogue", "--arms", "[]", "--fit.row_length", "128"],
            "fit.row_length is 128, but an example can take",
        ),
        (
            ["--select.variant", "dialogue", "--arms", "[]", "--debate.rounds", "1"],
            "select.variant or one of arms is dialogue, but debate.rounds is 1",
        ),
        (["--arms", "[dialogue]", "--debate.rounds", "1"], "one of arms is dialogue, but debate.rounds is 1"),
        (["--arms", "[pad]", "--rl.group_size", "1"], "rl.group_size: 1 is not possible; it must be at least 2"),
        (["--arms", "[vr]", "--rl.fit.row_length", "32"], "rl.fit.row_length is 32, but an example can take"),
        (["--arms", "[pad]", "--prm.whole.row_length", "32"], "prm.whole.row_length is 32, but an example can take"),
        (["--arms", "[pad]", "--prm.frozen.rows", "0"], "prm.frozen.rows: 0 is not possible"),
        (["--arms", "[pad]", "--prm.temperature", "0"], "prm.temperature: 0.0 is not possible"),
        (
            ["--arms", "[vr]", "--rl.fit.mesh.data", "3"],
            "rl.fit.mesh: data 3 × fsdp -1 × tensor 1 does not make up the",
        ),
        (["--arms", "[vr]", "--rl.alarms.patience", "0"], "rl.alarms.patience: 0 is not possible"),
        (
            ["--arms", "[vr]", "--rl.rewards.coefficients", '{"verifable": 1.0}'],
            "rl.rewards.coefficients.verifable: there is no such reward; did you mean verifiable?",
        ),
        (
            ["--arms", "[vr]", "--rl.rewards.coefficients", '{"no_such_module:f": 1.0}'],
            "rl.rewards.coefficients.no_such_module:f: no_such_module cannot be imported",
        ),
        (["--arms", "[vr, padd]"], "arms: there is no 'padd'. Did you mean pad"),
        (["--select.variant", "summary"], "one of arms is summary, but debate.aggregation is majority: set that to"),
    ],
)
def test_settings_that_do_not_go_with_the_model(
    good: Path, refused: Callable[..., str], arguments: list[str], message: str
) -> None:
    assert message in refused(good, *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 8}, "'qwen3_moe' is a mixture of experts"),
        ({"model_type": "qwen2_5_vl", "vision_config": {}}, "'qwen2_5_vl' is a multimodal model"),
        ({"model_type": "gemma3", "text_config": {}}, "save the text model in it, as README"),
        ({"model_type": "phi3"}, "'phi3' is not supported; supported are"),
        ({"quantization_config": {"quant_method": "gptq"}}, "key quantization_config: quantised weights"),
        ({"logit_scale": 2.0}, "unknown keys ['logit_scale']"),
        ({"vocab_size": 390}, "says vocab_size 390: the tokenizer is not this model's"),
        ({"intermediate_size": 64}, "the tensors beside it are of another model"),
    ],
)
def test_models_that_cannot_be_used(
    good: Path, tmp_path: Path, refused: Callable[..., str], change: dict[str, Any], message: str
) -> None:
    told = refused(changed(good, tmp_path / "model", **change))
    assert message in told
    assert str(tmp_path / "model" / "config.json") in told


def test_files_that_cannot_be_used(good: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    cut = changed(good, tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    assert f"{cut}: not a readable safetensors file" in refused(cut.parent, code=1)
    assert "no such directory" in refused("./nowhere")
    (tmp_path / "runs" / "tiny").rename(tmp_path / "elsewhere")
    (tmp_path / "runs" / "tiny").write_text("a file")
    assert "tiny: cannot be written" in refused(good, code=1)


def test_rows_of_padding_are_legal_and_said(
    good: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    monkeypatch.setattr("agentark_jax.progress.Display.say", lambda display, text: shown.append(text))
    refused(good, "--fit.freeze", "[embed]")
    assert any("the embedding has 40 rows more than the tokenizer has tokens" in text for text in shown)


def test_what_an_arm_will_be_shown_or_told_fits(good: Path) -> None:
    """The task's own rationales may be longer than any answer; who is told an answer is told it in many words."""
    form = make_format(good, PromptConfig())
    model = Model("good", good, "revision", load_config(good), form)
    way = " ".join(["Mia has 5 coins."] * 12)
    questions = {
        "warm_start": [Question.make("task", "warm_start", "How many coins?", "5", "The answer is 5.")],
        "debate": [Question.make("task", "debate", "How many coins are left?", "5", f"{way}\nThe answer is 5.")],
    }

    def longest(*arms: str, agents: int = 1, **fit: int) -> int:
        debate = DebateConfig(agents=agents, rounds=1, max_tokens=24)
        warm_start = WarmStartConfig(peers=1, answer=FitConfig(row_length=512), revision=FitConfig(row_length=512))
        config = RunConfig(arms=list(arms), debate=debate, warm_start=warm_start, fit=FitConfig(**fit))
        return check_lengths(config, model, [Seat(model, ())], Layout(), questions)

    (debated,) = questions["debate"]
    learned = sum(map(len, form.question(debated))) + len(form.response(debated.rationale))
    with pytest.raises(UsageError, match=f"fit.row_length is {learned - 1}, but an example can take {learned} tokens"):
        longest("gold", row_length=learned - 1)
    alone = longest("gold", row_length=learned)
    assert longest("control", row_length=learned - 1) == alone
    asked = sum(map(len, form.instruction([HINT.format(question=debated.prompt, answer="5") + CLOSING])))
    assert longest("hinted", row_length=512) == asked + 24 > alone


def test_questions_that_are_held_out_in_other_words(good, refused, tmp_path):
    """They are named; told to drop them, the run goes on to the next stage without them."""
    story = "Mia buys {0} red apples at the market on Monday and gives half of them to her brother. {1} are left?"
    lines = [{"question": f"How much is {a} plus {a + 1}?", "answer": str(2 * a + 1)} for a in range(60)]
    lines += [
        {"question": story.format(2 * a, word), "answer": str(a)} for a in (4, 5) for word in ("How many", "What")
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({**line, "rationale": f"It is {line['answer']}."}) + "\n" for line in lines))
    sizes = {"warm_start": 20, "validation": 4, "debate": 20, "held_out": 20}
    options = ["--task.path", str(path), *(word for key, n in sizes.items() for word in (f"--questions.{key}", str(n)))]
    message = refused(good, *options)
    assert "overlap held-out ones" in message
    assert "evaluate.overlap drop" in message
    assert "red apples" in message
    message = refused(good, *options, "--evaluate.overlap", "drop", "--debate.max_tokens", "2")
    assert "debate.max_tokens is 2" in message  # the next thing that is checked
    counts = json.loads((tmp_path / "runs" / "tiny" / "questions" / "manifest.json").read_text())["counts"]
    assert counts["overlaps_dropped"] > 0
    assert counts["held_out"] == 20
    assert counts["overlaps_dropped"] == sum(sizes.values()) - sum(counts[split] for split in sizes)
