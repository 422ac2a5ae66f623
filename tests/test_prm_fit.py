"""`agentark prm fit`: process reward models of published labels, without a debate."""

import json
from pathlib import Path

import numpy as np
import pytest
from prm_models import TASK, spoiled, student

from agentark_jax import prm_fit
from agentark_jax.cli import main
from agentark_jax.data.first_errors import Solution, drawn, held_out, question_name, read_solutions
from agentark_jax.training.config import MeshConfig
from agentark_jax.training.mesh import make_mesh
from agentark_jax.training.prm import load_prm, read_card

QUESTIONS = TASK.questions("debate", 24)
FAST = ["--prm.frozen.epochs", "1", "--prm.frozen.rows", "8", "--prm.frozen.row_length", "128"]
FROZEN = [*FAST, "--prm.whole", "null"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return student(tmp_path_factory.mktemp("prm_fit") / "model", max_positions=512).directory


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Of each question a right solution and one with a wrong step."""
    rows = []
    for number, question in enumerate(QUESTIONS):
        place = number % len(question.meta["values"])
        for text, error in ((question.rationale, None), (spoiled(question, place), place)):
            rows.append({"question": question.prompt, "steps": text.splitlines(), "first_error": error})
    return write(tmp_path_factory.mktemp("data") / "mine.jsonl", rows)


def fit(base, data, out, *more) -> int:
    return main(["prm", "fit", "--model", str(base), "--data", str(data), "--out", str(out), *more])


@pytest.fixture(scope="module")
def made(base, data, tmp_path_factory) -> Path:
    """A model that both stages trained on one half of the questions."""
    out = tmp_path_factory.mktemp("made") / "prm"
    whole = [option.replace("frozen", "whole") for option in FAST]
    assert fit(base, data, out, *FAST, *whole, "--held_out", "0.5", "--prm.wrong_weight", "2") == 0
    return out


def test_the_result_is_a_model_that_knows_what_it_has_learned(base, made):
    card, found = read_card(made), load_prm(made, make_mesh(MeshConfig()))
    names = {question_name(question.prompt) for question in QUESTIONS}
    learned = set(card.published["questions"])
    assert learned < names
    asked = {each.prompt: Solution(each.prompt, ("a",), None, "own") for each in QUESTIONS}
    kept = {question_name(prompt) for prompt, each in asked.items() if held_out(each, 0.5, 0)}
    assert kept
    assert learned == names - kept
    assert card.labels == "own"
    assert card.counts["answers"] == 2 * len(learned)
    assert found.head["weight"].shape == (2, found.config.hidden_size)
    # Everything was trained, and what served that is gone.
    assert (made / "model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()
    assert sorted(each.name for each in (made / "stages").iterdir()) == ["frozen", "whole"]
    assert not list(made.glob("stages/*/model"))
    results = json.loads((made / "results.json").read_text())
    assert results["held_out"] == results["scored"] == 2 * len(kept)
    assert results["trained"]["frozen"]["steps"] > 0
    settings = (made / "fit.json").read_text()
    assert str(made.parent) not in settings + (made / "prm.json").read_text(), "no path of this machine"


def test_score_judges_what_was_held_out_as_fit_does(made, data, tmp_path, capsys):
    told, out = tmp_path / "told.json", tmp_path / "scored.jsonl"
    arguments = ["prm", "score", "--model", str(made), "--data", str(data), "--results", str(told), "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    results, scored = json.loads((made / "results.json").read_text()), json.loads(told.read_text())
    learned = read_card(made).counts["answers"]
    assert f"{learned} are to questions that the model was trained on: the figures leave them out" in printed
    assert f"{results['scored']} marked solutions" in printed
    assert scored["learned"] == learned
    assert sum("learned" in json.loads(line) for line in out.read_text().splitlines()) == learned
    for who, figures in results["first_errors"].items():
        assert who in printed
        assert scored["first_errors"][who]["f1"] == figures["f1"]
        assert scored["first_errors"][who]["calibration"]["n"] == figures["calibration"]["n"]
    assert {"the model", "the model, threshold fitted", "majority", "length-only"} == results["first_errors"].keys()


def test_only_what_was_learned_is_no_test(made, data, tmp_path, capsys):
    learned = set(read_card(made).published["questions"])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    known = [row | {"question": row["question"].upper()} for row in rows if question_name(row["question"]) in learned]
    some = write(tmp_path / "known.jsonl", known[:3])
    assert main(["prm", "score", "--model", str(made), "--data", str(some)]) == 0
    printed = capsys.readouterr().out
    assert "3 are to questions that the model was trained on" in printed
    assert "F1" not in printed
    plain = write(tmp_path / "plain.jsonl", [{key: known[0][key] for key in ("question", "steps")}])
    assert main(["prm", "score", "--model", str(made), "--data", str(plain)]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert json.loads(line)["learned"], "who asks for no figures gets all probabilities"


def test_the_same_command_trains_once_and_another_is_refused(base, data, tmp_path, capsys):
    out = tmp_path / "prm"
    arguments = [*FROZEN, "--held_out", "0.25", "--limit", "8", "--score", "4"]
    assert fit(base, data, out, *arguments) == 0
    first, written = capsys.readouterr().out, (out / "model.safetensors").stat()
    assert "trained on 8 of 48 solutions" in first
    assert "4 scored" in first
    assert fit(base, data, out, *arguments) == 0
    assert capsys.readouterr().out == first
    assert (out / "model.safetensors").stat() == written
    assert fit(base, data, out, *arguments, "--seed", "1") == 2
    assert "data.seed is 0, and would be 1. Give another --out" in capsys.readouterr().err
    assert fit(base, data, out, *arguments, "--prm.frozen.learning_rate", "1") == 2
    assert "prm.frozen.learning_rate is 0.0001, and would be 1" in capsys.readouterr().err
    assert fit(base, data, out, *arguments, "--prm.frozen.checkpoint_every", "7") == 0, "on which nothing depends"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert fit(base, data, tmp_path / "other", *arguments) == 2
    assert "holds thesis.tex" in capsys.readouterr().err


def test_a_kill_at_delivery_changes_nothing(base, data, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert fit(base, data, whole, *FROZEN) == 0
    deliver = prm_fit._deliver

    def half(model, out):
        (out / "config.json").write_bytes((model / "config.json").read_bytes())
        raise KeyboardInterrupt

    monkeypatch.setattr(prm_fit, "_deliver", half)
    assert fit(base, data, killed, *FROZEN) == 130
    assert main(["prm", "score", "--model", str(killed), "--data", str(data)]) == 2, "it is not finished"
    monkeypatch.setattr(prm_fit, "_deliver", deliver)
    assert fit(base, data, killed, *FROZEN) == 0
    for name in ("model.safetensors", "head.safetensors", "prm.json", "fit.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_solutions_that_are_too_long_are_counted(base, data, tmp_path, capsys):
    long = [json.loads(line) for line in data.read_text().splitlines()]
    long[0]["steps"] = long[0]["steps"] * 20
    more = write(tmp_path / "long.jsonl", long)
    out = tmp_path / "prm"
    assert fit(base, more, out, *FROZEN, "--held_out", "0") == 0
    printed = capsys.readouterr().out
    assert "trained on 47 of 48 solutions, 1 more were too long" in printed
    assert "no question was held out" in printed
    assert fit(base, more, tmp_path / "none", *FROZEN, "--prm.frozen.row_length", "8") == 2
    assert "are longer than prm.frozen.row_length, 8 tokens" in capsys.readouterr().err


def test_settings_come_from_a_file_too(base, data, tmp_path):
    config = tmp_path / "prm.yaml"
    config.write_text("prm: {whole: null, wrong_weight: 3, frozen: {rows: 8, row_length: 128, steps: 1}}\n")
    out = tmp_path / "prm"
    assert fit(base, data, out, "--config", str(config), "--score", "2") == 0
    settings = json.loads((out / "fit.json").read_text())
    assert settings["prm"]["objective"]["wrong_weight"] == 3
    assert settings["prm"]["whole"] is None
    assert settings["counts"]["frozen"]["steps"] == 1


def test_values_of_steps_are_learned_as_they_are(base, tmp_path, monkeypatch):
    seen = []
    train = prm_fit.train_prm

    def spied(work, config, student, prompt, examples, **settings):
        seen.extend(examples)
        return train(work, config, student, prompt, examples, **settings)

    monkeypatch.setattr(prm_fit, "train_prm", spied)
    rows = [
        {"question": question.prompt, "steps": question.rationale.splitlines()[:2], "right": [1, 0.25]}
        for question in QUESTIONS[:4]
    ]
    assert fit(base, write(tmp_path / "soft.jsonl", rows), tmp_path / "prm", *FROZEN, "--held_out", "0") == 0
    assert len(seen) == 4
    for example in seen:
        np.testing.assert_array_equal(example.step_labels, np.float32([1, 0.25]))


def test_what_is_drawn_is_a_part_of_what_more_would_be():
    given = [Solution(f"question {index // 4}", (f"{index}",), None, "own") for index in range(400)]
    for whole in (True, False):
        few, many = (drawn(given, limit, 0, whole=whole) for limit in (80, 160))
        assert len(few) == 80
        assert set(few) < set(many)
        assert (len({given[index].question for index in few}) == 20) == whole
    assert drawn(given, None, 0, whole=True) == list(range(400))
    assert drawn(given, 80, 1, whole=False) != drawn(given, 80, 0, whole=False)


def test_a_limited_score_draws_from_what_was_not_learned(made, data, tmp_path, capsys):
    out = tmp_path / "scored.jsonl"
    arguments = ["prm", "score", "--model", str(made), "--data", str(data), "--out", str(out), "--limit", "3"]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 3
    assert not any("learned" in row for row in rows)
    assert "are to questions that the model was trained on" in capsys.readouterr().out


def test_variants_of_a_question_are_held_out_together(tmp_path):
    rows = [
        {
            "original_question": "What is 1 + 1?",
            "modified_question": asked,
            "original_process": ["1. 1 + 1 is 2."],
            "modified_process": ["1. 1 + 1 is 3."],
            "error_steps": [1],
            "classification": "counterfactual",
        }
        for asked in ("What is 1 + 1?", "What is one and one?")
    ]
    path = write(tmp_path / "test.jsonl", rows)
    found = read_solutions("prmbench_pairs", path)
    assert [each.kind for each in found] == ["counterfactual", "original", "counterfactual"], "the original once"
    assert found[1].first_error is None
    assert len({each.source for each in found}) == 1
    assert len(read_solutions("prmbench", path)) == 2


def test_the_share_of_questions_is_held_out():
    asked = [Solution(f"question {number}", ("a",), None, "own") for number in range(2000)]
    for share in (0.0, 0.1, 0.5):
        kept = [held_out(each, share, 0) for each in asked]
        assert abs(np.mean(kept) - share) < 0.03
    assert [held_out(each, 0.5, 0) for each in asked] != [held_out(each, 0.5, 1) for each in asked]
    assert held_out(Solution("  Question\n7 ", ("b",), 0, "own"), 0.5, 0) == held_out(asked[7], 0.5, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?", "steps": ["a"]}, "1 of 1 solutions have no labels"),
        (
            {"question": "?", "steps": ["a"], "right": [1], "first_error": None},
            "line 1: has both first_error and right",
        ),
        ({"question": "?", "steps": ["a", "b"], "right": [1]}, "line 1: right is [1]; it is a list of 2 numbers"),
        ({"question": "?", "steps": ["a"], "right": [1.5]}, "a list of 1 numbers from 0 to 1"),
        ({"question": "?", "steps": ["a"], "right": [True]}, "a list of 1 numbers from 0 to 1"),
        ({"question": "?", "solution": "a", "right": [1]}, 'line 1: right counts steps: give "steps"'),
    ],
)
def test_rows_that_teach_nothing(base, tmp_path, capsys, row, message):
    assert fit(base, write(tmp_path / "data.jsonl", [row]), tmp_path / "prm") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "prm").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset", "gsm8k"], "--dataset 'gsm8k': give one of mr_ben"),
        (["--dataset", "mr_ben"], "no row of mr_ben"),
        (["--held_out", "1"], "--held_out is 1.0: give a share"),
        (["--limit", "0"], "--limit is 0"),
        (["--data", "none.jsonl"], "none.jsonl, which does not exist"),
        (["--model", "./none"], "no such directory"),
        (["--prm.labels", "debate"], "prm.labels: labels are those of the data"),
        (["--prm.frozen.eval_every", "5"], "prm.frozen.eval_every is 5"),
        (["--prm.frozen.rows", "0"], "prm.frozen.rows"),
        (["--prm.wrong_wight", "2"], "Did you mean prm.wrong_weight"),
    ],
)
def test_arguments_that_cannot_be_used(base, data, tmp_path, capsys, more, message):
    assert fit(base, data, tmp_path / "prm", *more) == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_named(base, data, capsys):
    for arguments, message in (
        (["--data", str(data), "--out", "prm"], "--model is missing"),
        (["--model", str(base), "--out", "prm"], "--data is missing"),
        (["--model", str(base), "--data", str(data)], "--out is missing"),
    ):
        assert main(["prm", "fit", *arguments]) == 2
        assert message in capsys.readouterr().err
