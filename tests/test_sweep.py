"""Sweeps: which cells there are, what each runs, what is done again, and the table of what they came to."""

import csv
import io
import json
from pathlib import Path

import pytest

from agentark_jax.cli import main
from agentark_jax.config import to_yaml
from agentark_jax.errors import UsageError
from agentark_jax.sweep import Cell, Sweep, as_csv, entries, load_sweep, run_cells

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "configs" / "paper_grid.yaml"
GRID = """\
name: grid
base: base.yaml
common: {seeds: [0, 1]}
axes:
  teacher:
    large: {team: [{model: some/model}], debate.temperature: 0.5}
    own: {}
  agents:
    a2: {debate.agents: 2}
    a3: {debate.agents: 3, task.name: gsm8k}
leave_out:
  - {teacher: own, agents: [a3]}
"""
CELLS = ["large-a2", "large-a3", "own-a2"]


def written(directory: Path, text: str = GRID) -> Path:
    (directory / "base.yaml").write_text("debate: {rounds: 3}\narms: [gold]\n")
    path = directory / "grid.yaml"
    path.write_text(text)
    return path


def sweep_at(directory: Path, text: str = GRID, *options: str) -> Sweep:
    return load_sweep(written(directory, text), options, root=str(directory / "runs"))


def finish(sweep: Sweep, cell: str, **accuracies: float) -> None:
    """Results of a cell: so many of 200 answers of each arm are right."""

    def row(arm: str, value: float) -> dict:
        figures = {"low": value - 0.05, "high": value + 0.05, "n": 200}
        return {"accuracy": value, "difference": round(value - accuracies["base"], 3), "a": arm, "b": "base", **figures}

    rows = {arm: row(arm, value) for arm, value in accuracies.items()}
    differences = [each for arm, each in rows.items() if arm != "base"] + [row("student", 0.9) | {"b": "gold"}]
    results = {"schema": 1, "run": {}, "model": {}, "task": {}, "arms": rows, "differences": differences}
    directory = sweep.grid.directory / cell
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("")
    (directory / "results.json").write_text(json.dumps(results))


def test_cells_are_the_product_without_what_is_left_out(tmp_path):
    sweep = sweep_at(tmp_path)
    assert [cell.name for cell in sweep.grid.cells()] == CELLS
    only = GRID.replace("leave_out:\n  - {teacher: own, agents: [a3]}", "only:\n  - {agents: a3}\n  - {teacher: own}")
    assert [cell.name for cell in sweep_at(tmp_path, only).grid.cells()] == ["large-a3", "own-a2", "own-a3"]


def test_a_cell_is_an_ordinary_configuration(tmp_path):
    sweep = sweep_at(tmp_path, GRID, "--questions.debate", "7")
    config = sweep.config(Cell({"teacher": "large", "agents": "a3"}))
    assert config.directory == tmp_path / "runs" / "grid" / "large-a3"
    assert (config.debate.agents, config.debate.rounds, config.debate.temperature) == (3, 3, 0.5)
    assert (config.seeds, config.arms, config.task.name, config.questions.debate) == ([0, 1], ["gold"], "gsm8k", 7)
    assert [member.model for member in config.team] == ["some/model"]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("name: grid", "nam: grid", "there is no nam"),
        ("agents: [a3]", "agents: [a4]", "leave_out: axis agents has no 'a4'; it has a2, a3"),
        ("- {teacher: own", "- {techer: own", "leave_out: there is no axis 'techer'; there are teacher, agents"),
        ("own: {}", "own: []", "axes.teacher.own: give keys and their values"),
        ("own: {}", "own: {name: x}", "axes.teacher.own: give keys and their values, and not name or root"),
        ("  agents:\n", "  arm:\n", "axes.arm"),
        ("base: base.yaml", "base: []", "base is empty"),
        ("    a3: {debate.agents: 3", "    a 3: {debate.agents: 3", "'a 3' is no name"),
        ("name: grid", "name: [", "cannot be read as YAML"),
        ("name: grid", "name: 5", "name is 5"),
        ("    a3: {", "    a2: {", "a2 stands twice"),
        ("  agents:\n", "  teacher:\n", "teacher stands twice"),
        ("    a3: {", "    3: {", "axes.agents: 3 is no name: put it in quotes"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path, old, new, complaint):
    assert old in GRID
    with pytest.raises(UsageError, match=r"grid\.yaml: ") as caught:
        sweep_at(tmp_path, GRID.replace(old, new))
    assert complaint in str(caught.value)


def test_a_cell_that_is_no_configuration_is_named_before_anything_runs(tmp_path):
    sweep = sweep_at(tmp_path, GRID.replace("debate.agents: 2", "debate.agnts: 2"))
    ran = []
    with pytest.raises(UsageError, match=r"cell large-a2: .*debate\.agnts"):
        run_cells(sweep, 0, 1, lambda _: None, lambda arguments: ran.append(arguments) or 0)
    assert not ran


def test_workers_share_the_cells_and_leave_alone_what_is_done(tmp_path):
    sweep = sweep_at(tmp_path)
    finish(sweep, "large-a3", base=0.5, student=0.5)
    ran, told = [], []

    def run(arguments: list[str]) -> int:
        ran.append(arguments[arguments.index("--name") + 1])
        return 1 if ran[-1] == "large-a2" else 0

    assert run_cells(sweep, 0, 2, told.append, run) == ["large-a2"]
    assert ran == ["large-a2", "own-a2"], "one that fails does not stop the next"
    assert run_cells(sweep, 1, 2, told.append, run) == []
    assert ran == ["large-a2", "own-a2"]
    assert "large-a2: failed with exit code 1" in told
    assert told[-1] == "1 of 1 cells of this share are done."


def test_a_cell_that_was_made_with_another_configuration_is_not_taken_for_done(tmp_path):
    sweep = sweep_at(tmp_path)
    finish(sweep, "large-a3", base=0.5, student=0.5)
    directory = sweep.grid.directory / "large-a3"
    (directory / "config.yaml").write_text(to_yaml(sweep.config(Cell({"teacher": "large", "agents": "a3"}))))
    (directory / "debate").mkdir()
    (directory / "debate" / "manifest.json").write_text("{}")
    ran = []

    def run(arguments: list[str]) -> int:
        ran.append(arguments[arguments.index("--name") + 1])
        return 0

    assert run_cells(sweep, 1, 3, lambda _: None, run) == []
    changed = GRID.replace("debate.temperature: 0.5", "debate.temperature: 0.7")
    with pytest.raises(UsageError, match=r"different: debate\.temperature \(0\.5 → 0\.7\)"):
        run_cells(sweep_at(tmp_path, changed), 1, 3, lambda _: None, run)
    assert not ran
    assert run_cells(sweep_at(tmp_path, changed, "--update"), 1, 3, lambda _: None, run) == []
    assert ran == ["large-a3"]


def test_the_list_says_what_is_done(tmp_path, capsys):
    sweep = sweep_at(tmp_path)
    finish(sweep, "large-a3", base=0.5, student=0.5)
    (sweep.grid.directory / "own-a2").mkdir()
    (sweep.grid.directory / "own-a2" / "config.yaml").write_text("")
    arguments = ["sweep", "--config", str(sweep.file), "--root", str(tmp_path / "runs")]
    assert main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["to do  large-a2", "done   large-a3", "begun  own-a2", "1 of 3 cells are done."]
    assert main([*arguments, "--shard", "2/2"]) == 2
    assert "--shard is '2/2'" in capsys.readouterr().err


def test_the_table_has_what_is_there_and_says_what_is_missing(tmp_path, capsys):
    sweep = sweep_at(tmp_path)
    finish(sweep, "large-a2", base=0.5, student=0.625, gold=0.25)
    finish(sweep, "own-a2", base=0.5, student=0.4)
    arguments = ["sweep", "--config", str(sweep.file), "--root", str(tmp_path / "runs"), "--table"]
    assert main([*arguments, "accuracy"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "| teacher | agents | base | student | gold |"
    assert shown[2] == (
        "| large | a2 | 50.0 \\[45.0, 55.0\\] (n = 200) | 62.5 \\[57.5, 67.5\\] (n = 200) "
        "| 25.0 \\[20.0, 30.0\\] (n = 200) |"
    )
    assert shown[3] == "| large | a3 | missing | missing | missing |"
    assert shown[4].endswith(" (n = 200) |  |"), "an arm that this cell does not have"
    assert (sweep.grid.directory / "accuracy.md").read_text().splitlines() == shown

    chosen = ["--rows", "agents", "--columns", "teacher", "--where", "arm=student"]
    assert main([*arguments, "difference", *chosen]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "| agents | large | own |"
    assert shown[2].startswith("| a2 | +12.5 ")
    assert shown[3] == "| a3 | missing |  |", "own-a3 is left out of the grid"

    rows = list(csv.DictReader(io.StringIO((sweep.grid.directory / "difference.csv").read_text())))
    assert [(row["teacher"], row["agents"], row["arm"], row["difference"]) for row in rows] == [
        ("large", "a2", "student", "0.125"),
        ("large", "a3", "student", ""),
        ("own", "a2", "student", "-0.1"),
    ]
    assert rows[0]["n"] == "200"
    assert as_csv(entries(sweep, "accuracy", {}), "accuracy").startswith("teacher,agents,arm,accuracy,low,high,n\n")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--rows", "agents", "--columns", "arm"], "axis teacher is neither in --rows nor in --columns"),
        (["--rows", "agent"], "there is no axis 'agent'"),
        (["--where", "teacher=small"], "--where: axis teacher has no 'small'"),
        (["--where", "teacher"], "--where is 'teacher'"),
        (["--where", "teacher=own", "--where", "agents=a3"], "--where: no cell of the sweep has these labels together"),
    ],
)
def test_a_table_that_cannot_be_is_refused(tmp_path, capsys, options, complaint):
    sweep = sweep_at(tmp_path)
    arguments = ["sweep", "--config", str(sweep.file), "--root", str(tmp_path / "runs"), "--table", "accuracy"]
    assert main([*arguments, *options]) == 2
    assert complaint in capsys.readouterr().err


def test_an_arm_that_no_cell_has_is_refused(tmp_path, capsys):
    sweep = sweep_at(tmp_path)
    for cell in CELLS:
        finish(sweep, cell, base=0.5, student=0.625)
    arguments = ["sweep", "--config", str(sweep.file), "--root", str(tmp_path / "runs"), "--table", "accuracy"]
    assert main([*arguments, "--where", "arm=glod"]) == 2
    assert "--where: no cell has the arm glod" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damaged", ["{", "[]", '{"schema": 1, "run": {}, "model": {}, "task": {}, "arms": {"base": {"n": 3}}}']
)
@pytest.mark.parametrize("measure", ["accuracy", "difference"])
def test_results_that_are_damaged_are_named(tmp_path, capsys, damaged, measure):
    sweep = sweep_at(tmp_path)
    finish(sweep, "large-a2", base=0.5, student=0.625)
    path = sweep.grid.directory / "large-a2" / "results.json"
    path.write_text(damaged)
    assert main(["sweep", "--config", str(sweep.file), "--root", str(tmp_path / "runs"), "--table", measure]) == 1
    assert f"{path}: damaged" in capsys.readouterr().err


def paper() -> tuple[Sweep, list[Cell]]:
    sweep = load_sweep(PAPER)
    return sweep, list(sweep.grid.cells())


def test_the_papers_grid_has_its_experiments():
    _, cells = paper()
    studies = [cell.labels["study"] for cell in cells]
    assert {study: studies.count(study) for study in studies} == {
        "main": 3 * 5 * 4 * 2,
        "agents": 2 * 3 * 2,
        "volume": 4 * 4 * 2,
        "prm": 2 * 2 * 4 * 2,
    }


def check(sweep: Sweep, cell: Cell) -> None:
    config = sweep.config(cell)
    assert {"pad", "diverse_k2", "answer_only"} <= set(config.arms)
    assert config.debate.agents == int(cell.labels["agents"][1:])
    assert f"on_{config.task.held_out}" == cell.labels["test"]
    assert [member.model is not None for member in config.team] == [True]


def test_every_label_of_the_papers_grid_is_in_a_cell_that_can_be_run():
    sweep, cells = paper()
    missing = {(axis, label) for axis, labels in sweep.grid.axes.items() for label in labels}
    while missing:
        cell = max(cells, key=lambda cell: len(missing & cell.labels.items()))
        assert missing & cell.labels.items()
        missing -= cell.labels.items()
        check(sweep, cell)


@pytest.mark.slow
def test_every_cell_of_the_papers_grid_can_be_run():
    sweep, cells = paper()
    for cell in cells:
        check(sweep, cell)
