"""The recipes of `configs/`: each fits the topologies that its header names, as far as no compiler has to be asked."""

import re
from operator import attrgetter
from pathlib import Path

import pytest

from agentark_jax import preflight
from agentark_jax.config import parse
from agentark_jax.models.published import describe
from benchmarks import dry_runs
from benchmarks.dry_runs import CONFIGS, LORA, README, RESULTS, SCALING, TRAINED, DryRun

NO_RECIPES = {"quickstart", "lab", "gsm8k", "medmcqa", "arms", "pad_lab", "attribution_lab", "paper_grid", LORA.stem}
PAD = [
    *sorted(path.stem for path in CONFIGS.glob("pad_*.yaml") if path.stem != "pad_lab"),
    "attribution_gemma3_270m",
]
RUNS = list(dry_runs.dry_runs())


def test_every_recipe_names_a_topology_for_both_ways_of_training() -> None:
    recipes = {path.stem for path in CONFIGS.glob("*.yaml")} - NO_RECIPES - set(PAD)
    assert {(run.recipe, run.trained) for run in RUNS} == {(recipe, way) for recipe in recipes for way in TRAINED}


def test_what_recipes_name_was_dry_run() -> None:
    assert set(RUNS) == set(dry_runs.read(RESULTS))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.recipe}-{run.trained}-{run.topology}")
def test_the_recipe_fits(run: DryRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def uncompiled(*_: object) -> preflight.StepMemory:
        return preflight.StepMemory(0, "nothing: what a TPU needs is in the result file")

    monkeypatch.setattr(preflight, "compiled_memory", uncompiled)
    config = run.config()
    for fit in (config.warm_start.answer, config.warm_start.revision):
        assert (fit.rows, fit.row_length, fit.mesh, fit.lora) == (
            config.fit.rows,
            config.fit.row_length,
            config.fit.mesh,
            config.fit.lora,
        )
    found, stored = run(), dry_runs.read(RESULTS)[run]
    assert found["fits"]
    assert (found["rows"], found["row_length"]) == (stored["rows"], stored["row_length"])


@pytest.mark.parametrize("recipe", PAD)
def test_every_training_of_process_aware_distillation_fits(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def uncompiled(*_: object) -> preflight.StepMemory:
        return preflight.StepMemory(0, "nothing: that takes a compiler")

    monkeypatch.setattr(preflight, "compiled_memory", uncompiled)
    path = CONFIGS / f"{recipe}.yaml"
    found = re.search(r"in (\S+): prm\.frozen, prm\.whole, rl\.fit\.", path.read_text().replace("\n#", ""))
    assert found is not None, "the header names what the trainings fit in"
    files = [path] if recipe != "pad_gemma3_270m" else [CONFIGS / "gemma3_270m.yaml", path]
    config, _ = parse([option for file in files for option in ("--config", str(file))], "test", "")
    assert {"pad", "vr"} <= set(config.arms)
    assert config.fits[-3:] == ("prm.frozen", "prm.whole", "rl.fit")
    for key in config.fits:
        rl = config.rl if key == "rl.fit" else None
        report = preflight.preflight(
            recipe, describe(config.model), attrgetter(key)(config), preflight.topology(found[1]), rl, key
        )
        assert report.fits, key
        if rl is not None:  # the policy, what it started from, and the process reward model
            alone = preflight.preflight(recipe, describe(config.model), rl.fit, preflight.topology(found[1]))
            assert report.parameter_bytes > 1.5 * alone.parameter_bytes


def test_readme_shows_the_results_of_what_the_recipes_name() -> None:
    results = dry_runs.read(RESULTS)
    assert set(results) <= set(RUNS)
    assert all(result["fits"] for result in results.values())
    assert dry_runs.table(results) in README.read_text()
    assert dry_runs.sizes(results) in SCALING.read_text()


def test_what_is_not_run_again_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, scaling = tmp_path / "README.md", tmp_path / "scaling.md"
    for page in (readme, scaling):
        page.write_text("before\n\n| recipe | old |\n|---|---|\n| x | y |\n\nafter\n")
    monkeypatch.setattr(dry_runs, "RESULTS", tmp_path / "dry_runs.json")
    monkeypatch.setattr(dry_runs, "README", readme)
    monkeypatch.setattr(dry_runs, "SCALING", scaling)
    for recipe in ("qwen3_0.6b", "qwen3_8b"):
        assert dry_runs.main(["--platform", "gpu", "--only", recipe]) == 0
    assert "2 of 2: qwen3_8b, adapters, 2xH100-80GB: fits, " in capsys.readouterr().err
    assert dry_runs.main(["--table"]) == 0
    table = capsys.readouterr().out
    assert readme.read_text() == f"before\n\n{table}\nafter\n"
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| `qwen3_0.6b`", "| `qwen3_8b`"]
    rows = [line.split(" | ") for line in scaling.read_text().splitlines() if line.startswith("| `")]
    assert [(row[0][2:], row[2], row[4]) for row in rows] == [
        (f"`{run.recipe}`", run.trained, run.topology)
        for run in RUNS
        if run.recipe in ("qwen3_0.6b", "qwen3_8b") and "H100" in run.topology
    ]
    assert rows[-1][3] == "16 × 2,048"
    assert dry_runs.main(["--only", "qwen9"]) == 2
    assert "there is no recipe 'qwen9'" in capsys.readouterr().err
    (tmp_path / "dry_runs.json").write_text("{}")
    assert dry_runs.main(["--platform", "gpu", "--only", "qwen3_8b"]) == 0
    (tmp_path / "dry_runs.json").write_text("[1]")
    assert dry_runs.main(["--table"]) == 1
    assert "not a file of dry runs" in capsys.readouterr().err


def test_what_does_not_fit_or_cannot_be_run_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dry_runs, "RESULTS", tmp_path / "dry_runs.json")
    for page in ("README", "SCALING"):
        monkeypatch.setattr(dry_runs, page, tmp_path / page)
        (tmp_path / page).write_text("")
    small, odd = (DryRun("qwen3_8b", "all parameters", name) for name in ("1xH100-80GB", "3xH100-80GB"))
    monkeypatch.setattr(dry_runs, "dry_runs", lambda: iter([small, odd]))
    assert dry_runs.main([]) == 1
    shown = capsys.readouterr().err
    assert "DOES NOT FIT" in shown
    assert "FAILED: fit." in shown
    assert "**does not fit**" in dry_runs.table(dry_runs.read(tmp_path / "dry_runs.json"))
