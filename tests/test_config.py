"""The command line: what teaches, what is refused and how, what is saved."""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml

from agentark_jax import cli, config
from agentark_jax.errors import UsageError
from agentark_jax.models.config import Lora
from agentark_jax.tasks.config import FieldsConfig, GymConfig, HubConfig

ROOT = Path(__file__).parent.parent
# They are given after another config.
LORA, ARMS = ROOT / "configs" / "lora.yaml", ROOT / "configs" / "arms.yaml"
SWEEP = ROOT / "configs" / "paper_grid.yaml"
CONFIGS = sorted(set((ROOT / "configs").glob("*.yaml")) - {LORA, ARMS, SWEEP})


def parse(*arguments: str) -> config.RunConfig:
    return config.parse(arguments, "agentark run", "")[0]


@cache
def shipped(path: Path) -> config.RunConfig:
    return parse("--config", str(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_configs_are_valid_and_survive_a_round_trip(path, tmp_path):
    parsed = shipped(path)
    assert parsed.name == path.stem
    (tmp_path / "again.yaml").write_text(config.to_yaml(parsed))
    assert parse("--config", str(tmp_path / "again.yaml")) == parsed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_adapters_can_be_trained_instead_of_what_any_config_trains(path):
    alone, adapted = shipped(path), parse("--config", str(path), "--config", str(LORA))
    for before, after in (
        (alone.fit, adapted.fit),
        (alone.warm_start.answer, adapted.warm_start.answer),
        (alone.warm_start.revision, adapted.warm_start.revision),
    ):
        adapters = {"learning_rate": 2e-4, "lora": Lora(32, 64.0), "freeze": []}
        assert after == replace(before, **adapters)
    warm_start = replace(adapted.warm_start, answer=alone.warm_start.answer, revision=alone.warm_start.revision)
    assert replace(adapted, fit=alone.fit, warm_start=warm_start) == alone


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_further_students_can_be_asked_of_any_config(path):
    alone, compared = shipped(path), parse("--config", str(path), "--config", str(ARMS))
    given = yaml.safe_load(ARMS.read_text())
    assert {"control", "samples", "gold", "diverse_k2_after_student"} <= set(given["arms"])
    assert compared == replace(alone, **given)


@pytest.mark.parametrize("recipe", ["gsm8k", "medmcqa"])
def test_a_datasets_recipe_has_the_papers_strategies(recipe):
    parsed = parse("--config", str(ROOT / "configs" / f"{recipe}.yaml"))
    assert {"control", "answer_only", "diverse_k2", "diverse_k2_after_student"} <= set(parsed.arms)
    assert parsed.fit == replace(parsed.warm_start.answer, coefficients={"reasoning": 1.0, "answer": 1.0})


def test_a_mistake_in_one_of_several_files_names_them(tmp_path):
    (tmp_path / "wrong.yaml").write_text("fit: {rows: 0}")
    with pytest.raises(UsageError, match=rf"{tmp_path}/wrong\.yaml, {LORA}: fit\.rows: 0 is not possible"):
        parse("--config", str(tmp_path / "wrong.yaml"), "--config", str(LORA))


def test_adapters_survive_a_round_trip(tmp_path):
    parsed = parse("--fit.lora", "{rank: 4, alpha: 8, targets: [q_proj, v_proj]}")
    assert parsed.fit.lora == Lora(4, 8.0, ("q_proj", "v_proj"))
    (tmp_path / "again.yaml").write_text(config.to_yaml(parsed))
    assert parse("--config", str(tmp_path / "again.yaml")) == parsed


@pytest.mark.parametrize("given", ["debate: {agents: null}", "fit: {rows: null}", "fit: {mesh: {data: null}}"])
def test_null_stands_only_where_it_means_something(given, tmp_path):
    (tmp_path / "null.yaml").write_text(given)
    with pytest.raises(UsageError, match=r"(agents|rows|data): null is not possible here"):
        parse("--config", str(tmp_path / "null.yaml"))


def test_a_team_and_methods_survive_a_round_trip(tmp_path):
    (tmp_path / "team.yaml").write_text(
        "team: [{model: null}, {model: other, servers: [http://host:1]}, {temperature: 0.5, prompt: {system: No.}}]\n"
        "methods: {mad: {rounds: 2}, dylan: {}, single: {cot: true, draw: {temperature: 0, max_tokens: 9}}}\n"
    )
    parsed = parse("--config", str(tmp_path / "team.yaml"))
    assert [agent.temperature for agent in parsed.team] == [None, None, 0.5]
    assert parsed.team[2].prompt.system == "No."
    assert list(parsed.methods.chosen()) == ["single", "mad", "dylan"]
    assert parsed.methods.mad.rounds == 2
    (tmp_path / "again.yaml").write_text(config.to_yaml(parsed))
    assert parse("--config", str(tmp_path / "again.yaml")) == parsed
    assert config.is_free("team.1.servers")
    assert not config.is_free("team.1.model")


def test_questions_of_ones_own_survive_a_round_trip(tmp_path):
    fields = "{question: qa.0.ask, answer: gold, choices: [a, b]}"
    parsed = parse("--task.hub", "{id: me/mine, split: test}", "--task.fields", fields, "--task.fields.context", "text")
    assert parsed.task.hub == HubConfig("me/mine", split="test")
    assert parsed.task.fields == FieldsConfig("qa.0.ask", "gold", choices=("a", "b"), context="text")
    (tmp_path / "again.yaml").write_text(config.to_yaml(parsed))
    assert parse("--config", str(tmp_path / "again.yaml")) == parsed
    with pytest.raises(UsageError, match=r"task\.fields\.questoin.*task\.fields\.question"):
        parse("--task.fields.questoin", "x")


def test_a_generators_parameters_survive_a_round_trip(tmp_path):
    parsed = parse("--task.gym", "{generator: chain_sum, parameters: {max_terms: 3, allow_negation: true}}")
    assert parsed.task.gym == GymConfig("chain_sum", {"max_terms": 3, "allow_negation": True})
    (tmp_path / "again.yaml").write_text(config.to_yaml(parsed))
    assert parse("--config", str(tmp_path / "again.yaml")) == parsed
    with pytest.raises(UsageError, match=r"task\.gym"):
        parse("--task.gym", "{parameters: {max_terms: 3}}")


def test_a_method_must_leave_room_for_a_prompt():
    with pytest.raises(UsageError, match=r"methods\.mad\.draw\.max_tokens is 512"):
        parse("--methods.mad.rounds", "2", "--methods.context", "512")


def test_later_options_override_the_file():
    parsed = parse("--config", str(ROOT / "configs/quickstart.yaml"), "--debate.rounds", "3", "--seeds", "[3,4]")
    assert parsed.debate.rounds == 3
    assert parsed.debate.agents == 3
    assert parsed.seeds == [3, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("debate: {agnts: 3}", r"debate\.agnts.*debate\.agents"),
        ("debat: {agents: 3}", r"debat.*debate"),
        ("agents: 3", r"agents.*debate\.agents"),
        ("debate: {agents: many}", r"debate\.agents.*int.*many"),
        ("debate: {agents: -1}", r"debate\.agents is -1"),
        ("questions: {held_out: -5}", r"questions\.held_out is -5"),
        ("fit: {learning_rate: -1.0}", r"learning_rate.*-1\.0"),
        ("fit: {lora: {rank: 0, alpha: 1.0}}", r"fit\.lora\.rank is 0"),
        ("fit: {lora: {rank: 2, alpha: 0.0}}", r"fit\.lora\.alpha is 0"),
        ("fit: {lora: {rank: 2, alpha: 4.0, targets: [head]}}", r"fit\.lora\.targets is \['head'\]"),
        ("fit: {lora: {rang: 2, alpha: 4.0}}", r"fit\.lora.*rang"),
        ("fit: {lora: {rank: 2, alpha: 4.0}, freeze: [embedding]}", r"fit\.freeze.*lora"),
        ("engine: {slots: 0}", r"engine\.slots is 0"),
        ("seeds: []", r"seeds is \[\]"),
        ("seeds: [1, 1]", r"seeds is \[1, 1\]"),
        ("name: ../elsewhere", r"name is '\.\./elsewhere'"),
        ("curve: [1.5]", r"curve is \[1\.5\]"),
        ("fit: {eval_every: 5}", r"fit\.eval_every is 5: students are not validated"),
        ("warm_start: {answer: {eval_every: 5}}", r"warm_start\.answer\.eval_every is 5: set questions\.validation"),
        ("warm_start: {revisions: 2, peers: 2, alone: 2}", r"warm_start\.alone is 2: give 0 to 1, fewer than"),
        ("fit: {coefficients: {answer: 1.0}}", r"fit\.coefficients is .*two terms reasoning and answer"),
        ("warm_start: {answer: {coefficients: {reasoning: 1, answer: 1}}}", r"warm_start\.answer\.coefficients is "),
        ("select: {weighting: equal}", r"select\.weighting"),
        ("debate: [", r"(?i)pars"),
        ("just text", r"(?i)config"),
    ],
)
def test_a_wrong_file_is_refused_naming_file_key_and_fix(tmp_path, capsys, content, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    assert cli.main(["run", "--config", str(path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("usage error: ")
    assert shown.count("\n") == 1
    assert "Traceback" not in shown
    assert str(path) in shown
    assert pytest.raises(UsageError, match=message).matches(UsageError(shown))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--debate.agnts", "3"], "debate.agents"),
        (["run", "--debate.agents", "many"], "debate.agents"),
        (["run", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["runn"], "unknown command"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, arguments, message):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_teaches_without_loading_jax():
    for command, expected in [
        ([], "agentark run --config configs/quickstart.yaml"),
        (["run"], "number of agents"),
    ]:
        script = (
            "import sys\nfrom agentark_jax import cli\n"
            f"try:\n    cli.main({[*command, '--help']})\nexcept SystemExit as done:\n    assert not done.code\n"
            "assert 'jax' not in sys.modules and 'scipy' not in sys.modules and 'torch' not in sys.modules\n"
        )
        shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
        assert expected in shown.stdout


def test_the_saved_configuration_is_complete(tmp_path):
    saved = yaml.safe_load(config.to_yaml(parse()))
    assert set(saved) == set(config.RunConfig.__dataclass_fields__)
    assert config.flat(saved)["warm_start.answer.learning_rate"] == parse().warm_start.answer.learning_rate


@pytest.mark.parametrize("key", ["--questions.debat", "--upd"])
def test_a_key_that_is_cut_short_is_not_taken_for_the_one_it_begins(key):
    with pytest.raises(UsageError, match=r"unknown key .*Did you mean (questions\.debate|update)"):
        parse(key, "3")
