"""`agentark prm`: solutions scored from files, and sources of step labels compared."""

import gzip
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from prm_models import TASK, spoiled, student, turn_of
from tiny_models import write_model

from agentark_jax.cli import main
from agentark_jax.data.config import PromptConfig
from agentark_jax.data.steps import steps
from agentark_jax.models.heads import init_head, save_heads, step_logits
from agentark_jax.models.transformer import hidden_states
from agentark_jax.process import LABELS, answers_of
from agentark_jax.traces.labels import grade_turns
from agentark_jax.traces.step_labels import StepLabels, load_step_labels, save_step_labels
from agentark_jax.traces.store import TraceStore
from agentark_jax.training.config import MeshConfig
from agentark_jax.training.mesh import make_mesh
from agentark_jax.training.prm import Card, load_prm, write_card

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the real data in ../shared/data is not there")

FILES = {
    "mr_ben": "mr_ben/math.jsonl.gz",
    "mr_gsm8k": "mr_gsm8k/wrong_solutions_subset.jsonl",
    "prmbench": "prmbench/test.jsonl.gz",
    "big_bench_mistake": "big_bench_mistake/multistep_arithmetic.jsonl",
}
QUESTIONS = TASK.questions("debate", 6)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny process reward model whose head says anything."""
    tiny = student(tmp_path_factory.mktemp("prm") / "model", max_positions=1024)
    head = init_head(tiny.config, "prm", 3)
    save_heads(tiny.directory, {"prm": {**head, "weight": head["weight"] * 5}})
    card = Card(
        tiny.form.tokenizer.hash, tiny.form.hash, PromptConfig(), "consensus", {"contrastive": 1.0}, 0.1, "made"
    )
    write_card(tiny.directory, card)
    return tiny.directory


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def own_rows(count=6):
    rows = []
    for number, question in enumerate(QUESTIONS[:count]):
        wrong = number % 2
        text = spoiled(question, 1) if wrong else question.rationale
        rows.append({"question": question.prompt, "steps": text.splitlines(), "first_error": 1 if wrong else None})
    return rows


def test_probabilities_are_those_of_the_head_where_steps_end(model, tmp_path, capsys):
    rows = own_rows()
    out = tmp_path / "scored.jsonl"
    data = write(tmp_path / "data.jsonl", rows)
    assert main(["prm", "score", "--model", str(model), "--data", str(data), "--out", str(out)]) == 0
    found = load_prm(model, make_mesh(MeshConfig()))
    for row, told in zip(rows, read(out), strict=True):
        prompt = [token for segment in found.form.question(QUESTIONS[rows.index(row)]) for token in segment]
        ids = list(found.form.response("\n".join(row["steps"])))
        cut = steps(ids, found.form.tokenizer)
        whole = np.asarray([*prompt, *ids], np.int32)[None]
        h = hidden_states(found.config, found.params, whole, np.arange(whole.shape[1], dtype=np.int32)[None])
        ends = np.asarray([[len(prompt) + step.end - 1 for step in cut]])
        right = np.asarray(jax.nn.softmax(step_logits(found.head, h, ends))[0, :, 1])
        np.testing.assert_allclose(told["right"], right, atol=1e-4)
        assert [text.strip() for text in told["steps"]] == row["steps"]
        below = np.flatnonzero(np.asarray(told["right"]) < 0.5)
        assert told["first_error"] == told["line"] == (int(below[0]) if len(below) else None)
        assert told["true_line"] == row["first_error"]
        assert told["question"] == row["question"]
    printed = capsys.readouterr().out
    assert "6 solutions scored, 0 skipped" in printed
    for word in ("F1", "errors located", "right ones cleared", "Brier", "ECE", "the model", "majority", "length-only"):
        assert word in printed
    assert "first errors told exactly, the model over majority:" in printed
    assert "F1, the model over majority:" in printed


def test_the_threshold_says_what_is_an_error(model, tmp_path):
    data = write(tmp_path / "data.jsonl", own_rows())
    for threshold, expected in (("0", None), ("1", 0)):
        out = tmp_path / f"{threshold}.jsonl"
        arguments = ["prm", "score", "--model", str(model), "--data", str(data), "--out", str(out)]
        assert main([*arguments, "--threshold", threshold]) == 0
        assert {row["first_error"] for row in read(out)} == {expected}


def test_without_marks_the_lines_are_printed(model, tmp_path, capsys):
    rows = [
        {"question": "What is 3+4?", "solution": "3+4=7\nThe answer is 7."},
        {"question": "?", "steps": ["a b " * 900]},
    ]
    assert main(["prm", "score", "--model", str(model), "--data", str(write(tmp_path / "d.jsonl", rows))]) == 0
    first, scored, skipped = capsys.readouterr().out.splitlines()
    assert "1 solutions scored, 1 skipped as too long" in first
    told = json.loads(scored)
    assert told.keys() == {"question", "steps", "right", "first_error"}
    assert len(told["right"]) == 2
    assert "longer than the 1024 tokens" in json.loads(skipped)["skipped"]


@needs_data
@pytest.mark.parametrize("dataset", FILES)
def test_published_files_are_scored(model, dataset, tmp_path, capsys):
    path = DATA / FILES[dataset]
    lines = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).splitlines()
    data = tmp_path / "some.jsonl"
    data.write_bytes(b"\n".join(lines[:: max(1, len(lines) // 24)][:24]) + b"\n")
    out = tmp_path / "out.jsonl"
    arguments = ["prm", "score", "--model", str(model), "--data", str(data), "--dataset", dataset, "--out", str(out)]
    assert main(arguments) == 0
    rows = read(out)
    scored = [row for row in rows if "right" in row]
    assert len(rows) == 24
    assert len(scored) >= 12
    for row in scored:
        assert len(row["right"]) == len(row["steps"]) > 0
        assert all(0 <= right <= 1 for right in row["right"])
        assert (row["line"] is None) == (row["first_error"] is None)
    assert f"{len(scored)} marked solutions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, 'line 1: write {"question": …, "steps": [texts]}'),
        ({"question": "?", "steps": "a"}, "line 1: write"),
        ({"question": "?", "solution": "a", "first_error": 0}, "line 1: first_error counts steps"),
        ({"question": "?", "steps": ["a"], "first_error": 1}, "line 1: first_error is 1; it is a number of 1 steps"),
        ({"question": "?", "steps": ["a"], "first_error": True}, "first_error is True"),
        ({"question": "?", "steps": [" "]}, "without a word"),
        ({"question": "?\ud800", "steps": ["a"]}, r"has '\ud800', which is half of a character"),
    ],
)
def test_rows_that_cannot_be_scored(model, tmp_path, capsys, row, message):
    data = write(tmp_path / "data.jsonl", [row])
    assert main(["prm", "score", "--model", str(model), "--data", str(data)]) == 2
    assert message in capsys.readouterr().err


def test_what_the_tokenizer_changes_is_skipped_where_it_is_marked(model, tmp_path, capsys):
    rows = [{"question": "?", "steps": [f"a{text}b", "c"], "first_error": 0} for text in ("<eos>", "e\u0301")]
    data, out = write(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl"
    assert main(["prm", "score", "--model", str(model), "--data", str(data), "--out", str(out)]) == 0
    spelled, skipped = read(out)
    assert len(spelled["steps"]) >= 2
    assert skipped["skipped"].startswith("tokens do not say the text, which the tokenizer changes")
    printed = capsys.readouterr().out
    assert "1 solutions scored, 0 skipped as too long for the model, 1 because their tokens do not say" in printed


def test_arguments_that_cannot_be_used(model, tmp_path, capsys):
    data = str(write(tmp_path / "data.jsonl", own_rows(1)))
    for arguments, message in (
        ([], "COMMAND"),
        (["score", "--data", data], "--model"),
        (["score", "--model", str(tmp_path), "--data", data], "prm.json: not found, so this is no finished process"),
        (["score", "--model", str(model), "--data", data, "--threshold", "1.5"], "'1.5' is no probability"),
        (["score", "--model", str(model), "--data", data, "--dataset", "gsm8k"], "invalid choice"),
        (["score", "--model", str(model), "--data", data, "--dataset", "mr_ben"], "no row of mr_ben"),
        (["score", "--model", str(model), "--data", str(tmp_path / "none.jsonl")], "does not exist"),
        (["score", "--model", str(model), "--data", data, "--batch_tokens", "0"], "--batch_tokens is 0"),
    ):
        assert main(["prm", *arguments]) == 2, arguments
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "fit", "score", "labels"])
def test_help_teaches_by_example(capsys, command):
    with pytest.raises(SystemExit):
        main(["prm", *command.split(), "--help"])
    assert "  agentark prm " in capsys.readouterr().out


# Labels


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A tiny model whose tokenizer those who debated have."""
    return student(tmp_path_factory.mktemp("speaker") / "model", max_positions=512)


@pytest.fixture
def run(speaker, tmp_path) -> Path:
    """A directory with the trace store of a debate: in the second round the third agent corrects its slip."""
    directory = tmp_path / "run"
    directory.mkdir()
    form = speaker.form
    with TraceStore(directory / "traces.sqlite") as store:
        store.put_questions(QUESTIONS)
        for question in QUESTIONS:
            said = [question.rationale, question.rationale, spoiled(question, 1)]
            first = [turn_of(form, question, text, agent) for agent, text in enumerate(said)]
            shown = tuple(turn.key for turn in first)
            second = [turn_of(form, question, question.rationale, agent, round=1, parents=shown) for agent in range(3)]
            store.record_many([*first, *second])
        questions = {question.id: question for question in QUESTIONS}
        store.put_labels(grade_turns(store.turns(), questions, TASK.grade, TASK.grader_id))
    return directory


def labels_of(run, speaker, *more):
    arguments = ["prm", "labels", str(run), "--grader", "final_answer", "--tokenizer", str(speaker.directory)]
    return main([*arguments, *more])


def row_of(printed: str, title: str, name: str) -> str:
    table = printed[printed.index(title) :]
    return next(line for line in table.splitlines() if name in line)


def test_free_sources_are_compared_with_each_other_and_with_the_truth(run, speaker, capsys):
    assert labels_of(run, speaker) == 0
    printed = capsys.readouterr().out
    assert "36 turns" in printed
    assert "83.3 [" in row_of(printed, "the same first error", "consensus"), "all but the six slips"
    debate = row_of(printed, "against the truth", "debate")
    assert debate.count("100.0 [") == 4
    consensus = row_of(printed, "against the truth", "consensus")
    assert "0.0 [0.0," in consensus, "no first error is where the consensus says"
    assert debate.rstrip(" │").endswith("0"), "at no cost"
    outcome = row_of(printed, "against the truth", "outcome")
    assert outcome.split("│")[2:] == consensus.split("│")[2:], "here the consensus is right"


def test_labels_of_files_and_of_stages_are_shown(run, speaker, tmp_path, capsys):
    with TraceStore(run / "traces.sqlite", read_only=True) as store:
        keys = [turn.key for turn in store.turns()]
        counts = {
            key: len(answer.steps) for key, answer in answers_of(store, keys, [speaker.form.tokenizer])[0].items()
        }
    place = run / "prm_labels" / LABELS
    place.parent.mkdir()
    save_step_labels(place, [StepLabels(keys[0], "continuations", (1.0,) * counts[keys[0]], 1234)])
    assert labels_of(run, speaker) == 0
    row = row_of(capsys.readouterr().out, "against the truth", "prm_labels/labels.jsonl")
    assert "1,234" in row
    save_step_labels(place, [StepLabels(keys[0], "continuations", (1.0,), 1234)])
    assert labels_of(run, speaker) == 2
    assert f"turn {keys[0]} has {counts[keys[0]]} steps but 1 labels" in capsys.readouterr().err
    save_step_labels(place, [StepLabels("f" * 24, "continuations", (1.0,), 1234)])
    assert labels_of(run, speaker) == 0
    assert "prm_labels" not in capsys.readouterr().out, "a control's turns are none of the debate's"
    place.unlink()
    save_step_labels(tmp_path / "other.jsonl", [StepLabels("f" * 24, "judge", (1.0,), 5)])
    assert labels_of(run, speaker, "--labels", str(tmp_path / "other.jsonl")) == 2
    assert "has labels of turn ffff" in capsys.readouterr().err


def test_models_are_asked_once(run, speaker, capsys):
    more = ["--speaker", str(speaker.directory), "--judge", str(speaker.directory), "--continuations", "2"]
    more += ["--max-tokens", "8", "--questions", "2", "--turns", "3"]
    assert labels_of(run, speaker, *more) == 0
    first = capsys.readouterr().out
    assert "agreed" in first
    places = {name: run / "step_labels" / name for name in ("continuations", "judge")}
    found = {name: load_step_labels(place / LABELS) for name, place in places.items()}
    assert len(found["continuations"]) == 6
    assert sum(each.tokens for each in found["continuations"]) > 0
    paid = {name: (place / "paid.jsonl").read_bytes() for name, place in places.items()}
    assert labels_of(run, speaker, *more) == 0
    assert capsys.readouterr().out == first
    assert {name: (place / "paid.jsonl").read_bytes() for name, place in places.items()} == paid


def test_requests_that_cannot_be_met(run, speaker, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for file in speaker.directory.iterdir():
        shutil.copy(file, other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    write_model(other, 500)
    assert main(["prm", "labels", str(run), "--grader", "final_answer"]) == 2
    assert "--tokenizer is missing" in capsys.readouterr().err
    assert main(["prm", "labels", str(run), "--grader", "final_answer", "--tokenizer", str(other)]) == 2
    assert "none of 36 turns was made with the tokenizer" in capsys.readouterr().err
    assert labels_of(run, speaker, "--speaker", str(speaker.directory), "--continuations", "0") == 2
    assert "--continuations and --max-tokens must be at least 1" in capsys.readouterr().err
    assert main(["prm", "labels", str(run), "--grader", "nobody", "--tokenizer", str(other)]) == 2
    assert "--grader 'nobody'" in capsys.readouterr().err
