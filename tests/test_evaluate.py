"""`agentark evaluate`: what it leaves behind, what it reuses and refuses, on a tiny random model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import real_server

from agentark_jax import cli, config
from agentark_jax.errors import UsageError
from agentark_jax.evaluation.config import SUITES
from agentark_jax.evaluation.predictions import load_predictions

ROOT = Path(__file__).parent.parent
SMALL = ["--questions", "6", "--max_tokens", "12", "--debate.max_tokens", "12", "--debate.rounds", "2"]


def parse(*arguments: str):
    return config.parse_evaluate(["--model", "m", *arguments], "agentark evaluate", "")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", ""], "model is missing: give --model DIR"),
        (["--suites", "[speed]"], r"suites is \['speed'\]: name some of accuracy"),
        (["--suites", "[]"], r"suites is \[\]"),
        (["--questions", "0"], "questions is 0"),
        (["--api", "openai"], "engine.servers is empty"),
        (["--served", "x"], "served is 'x', which is for api openai"),
        (["--level", "95"], "level is 95.0: give a confidence level between 0 and 1"),
        (["--accuracy.samples", "-1"], "accuracy.samples is -1"),
        (["--accuracy.temperature", "0"], "accuracy.temperature is 0.0"),
        (["--acuracy.samples", "4"], "Did you mean accuracy.samples"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_the_key_and_the_fix(arguments, message):
    with pytest.raises(UsageError, match=message):
        parse(*arguments)


def test_help_tells_of_every_suite():
    assert [suite for suite in SUITES if f"`{suite}`" not in cli.EVALUATE_DESCRIPTION] == []


def test_the_configuration_of_an_evaluation_is_read_from_a_file_and_options(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text("model: dir\nquestions: 7\naccuracy: {samples: 3}\n")
    resolved, update = config.parse_evaluate(["--config", str(file), "--questions", "9", "--update"], "", "")
    assert (resolved.model, resolved.questions, resolved.accuracy.samples, update) == ("dir", 9, 3, True)
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml(resolved))
    assert config.parse_evaluate(["--config", str(again)], "", "")[0] == resolved


def test_every_suite_has_its_settings_and_its_module():
    from agentark_jax.suites.registry import SUITES as modules

    assert tuple(modules) == SUITES
    for name in SUITES:
        assert hasattr(parse(), name)
        assert callable(modules[name].measure)


def start(root: Path, model: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "agentark_jax.cli", "evaluate", "--model", str(model), "--root", str(root)]
    return subprocess.Popen(
        [*command, *SMALL, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120"},
    )


def complete(root: Path, model: Path, *arguments: str, code: int = 0) -> str:
    process = start(root, model, *arguments)
    shown, _ = process.communicate(timeout=600)
    assert process.returncode == code, shown
    assert "Traceback" not in shown
    return shown


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return real_server.make_model(tmp_path_factory.mktemp("model") / "tiny", 0, positions=1024)


METHODS = ["--methods.self_consistency", "{samples: 2, draw: {temperature: 0.7, max_tokens: 12}}"]
METHODS += ["--methods.context", "400"]


@pytest.mark.slow
def test_an_evaluation_leaves_figures_behind_and_is_done_once(model, tmp_path):
    arguments = ["--accuracy.samples", "4", *METHODS]
    shown = complete(tmp_path, model, *arguments)
    directory = tmp_path / "evaluation"
    first = (directory / "results.json").read_text()
    results = json.loads(first)
    figures = results["suites"]["accuracy"]
    assert results["schema"] == 1
    assert list(figures["arms"]) == ["greedy", "samples", "vote", "debate", "self_consistency"]
    assert [arm["n"] for arm in figures["arms"].values()] == [6, 24, 6, 6, 6]
    assert [arm["calls"] for arm in figures["arms"].values()] == [6, 24, 24, 36, 12]
    for arm in figures["arms"].values():
        assert arm["low"] - 1e-9 <= arm["accuracy"] <= arm["high"] + 1e-9
    assert [one["k"] for one in figures["pass"]] == [one["k"] for one in figures["majority"]] == [1, 2, 4]
    assert [one["n"] for one in figures["majority"]] == [24, 12, 6]
    assert {one["b"] for one in figures["differences"]} == {"greedy"}
    stages = sorted(path.parent.name for path in directory.glob("accuracy_*/predictions.jsonl"))
    assert stages == ["accuracy_debate", "accuracy_greedy", "accuracy_samples", "accuracy_self_consistency"]
    kept = load_predictions(directory / "accuracy_samples" / "predictions.jsonl")
    assert sum(each.completion_tokens for each in kept) == pytest.approx(
        24 * figures["arms"]["samples"]["tokens_per_question"]["completion"]
    )
    assert "greedy" in shown

    again = complete(tmp_path, model, *arguments)
    assert "nothing was generated" in again
    assert (directory / "results.json").read_text() == first

    refused = complete(tmp_path, model, "--accuracy.samples", "6", *METHODS, code=2)
    assert "made with another configuration; different: accuracy.samples (4 → 6)" in refused
    more = complete(tmp_path, model, "--accuracy.samples", "6", "--update", *METHODS)
    assert more.count("up to date") == 5  # model, questions, greedy, debate, self-consistency


@pytest.mark.slow
def test_an_evaluation_that_is_killed_ends_as_one_that_is_not(model, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["--suites", "[self_correction]", "--self_correction.steps", "1"]
    complete(whole, model, *arguments)
    process = start(killed, model, *arguments)
    try:
        deadline = time.monotonic() + 300
        while not (killed / "evaluation" / "self_correction_neutral" / "begun.json").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    complete(killed, model, *arguments)

    def figures(root: Path) -> dict:
        results = json.loads((root / "evaluation" / "results.json").read_text())
        return results["suites"]

    assert figures(whole) == figures(killed)
    checks = figures(whole)["self_correction"]["checks"]
    assert {each["accuracy_2"]["n"] for each in checks.values()} == {6}
    assert "nothing was generated" in complete(killed, model, *arguments)


def test_a_question_that_the_model_cannot_take_is_refused_before_anything_is_asked(model, tmp_path, capsys):
    code = cli.main(["evaluate", "--model", str(model), "--root", str(tmp_path), *SMALL, "--max_tokens", "1020"])
    assert code == 2
    assert "max_tokens is 1020, and the longest question takes" in capsys.readouterr().err
    assert sorted(path.parent.name for path in tmp_path.rglob("manifest.json")) == ["model", "questions"]


@pytest.mark.sglang
def test_a_server_answers_for_the_model_and_says_what_the_embedded_engine_says(models, server, tmp_path):
    """The same greedy answers of the same lengths; and it is asked once."""
    arguments = ["--accuracy.samples", "2", "--accuracy.debate", "false"]
    complete(tmp_path / "served", models[0], *arguments, "--engine.servers", f"[{server}]")
    complete(tmp_path / "embedded", models[0], *arguments)
    served, embedded = (
        load_predictions(tmp_path / name / "evaluation" / "accuracy_greedy" / "predictions.jsonl")
        for name in ("served", "embedded")
    )
    assert [(each.question_id, each.answer, each.completion_tokens) for each in served] == [
        (each.question_id, each.answer, each.completion_tokens) for each in embedded
    ]
    assert "nothing was generated" in complete(
        tmp_path / "served", models[0], *arguments, "--engine.servers", f"[{server}]"
    )
