"""The projection's arithmetic by hand, and where its figures come from."""

import json
from dataclasses import asdict

import pytest

from agentark_jax.errors import AgentArkError
from agentark_jax.models.flops import sft_flops
from benchmarks import projection, results, scaling
from benchmarks.projection import CHIPS, Assumptions, Sources
from benchmarks.results import Comparison, Measured, Result, Row, Spread

ENVIRONMENT = {**results.environment(), "cpu": "a processor"}
CASE = scaling.Case("Qwen/Qwen3-0.6B", "v5e-8", row_length=1280)


def one(value: float) -> Spread:
    return Spread.of([value])


def speeds(name: str, model: str, sizes: dict[str, int], speed: float, floor: Spread) -> Result:
    row = Row("agentark_jax", "ours", Spread.of([speed] * len(floor.values)), floor, {}, 1.0, 1.0, 2)
    rates = {"bandwidth": Spread.of([2.0, 1.0])}
    return Result(name, name, "a/s", False, {"name": model}, sizes, [row], [], [], rates, ENVIRONMENT)


@pytest.fixture
def directory(tmp_path):
    """Results with round numbers."""
    sent = {scaling.TOTAL: 4.0, scaling.THEORY + scaling.TOTAL: 2.5}
    model = {"name": CASE.source, "topology": CASE.topology, "dtype": "bfloat16"}
    sizes = {"devices": 8, "data": 1, "fsdp": 8, "tensor": 1, "rows": 8, "row_length": 1280}
    measured = [Measured(name, name, "GB", one(value)) for name, value in sent.items()]
    compiled = Comparison(CASE.name, "", False, model, sizes, measured, [], [], ENVIRONMENT)
    counts = {"own_first": (3000.0, 2400.0), "shared_first": (3200.0, 900.0)}
    counted = [
        Measured(f"{layout}, 3 agents: {name}", "", "", one(value))
        for layout, values in counts.items()
        for name, value in zip(("prompt tokens", "new prompt tokens"), values, strict=True)
    ]
    asked = {"completion_tokens": 50, "agents": 3, "rounds": 2, "questions": 4}
    debates = Comparison("growth.debate", "", False, {"name": "prompts"}, asked, counted, [], [], ENVIRONMENT)
    stored = {"turns": 1000, "question_tokens": 100, "completion_tokens": 300}
    # 1000 turns at 500 a second are 2 seconds; a quarter of that at 2 GB/s, or half of it at 1 GB/s, is 1 GB.
    store = speeds("store", "debates", stored, 500.0, Spread.of([0.25, 0.5]))
    fit = speeds("sft.full", "a model", {}, 400.0, Spread.of([0.5]))
    for result in (compiled, debates, store, fit):
        results.write(result, tmp_path)
    run = {
        "recipe": "qwen3_0.6b",
        "trained": "all parameters",
        "topology": "v5e-16",
        "fits": True,
        "step": 3,
        "memory": 4,
    }
    (tmp_path / "dry_runs.json").write_text(json.dumps([run, {**run, "topology": "v5p-8"}]))
    return tmp_path


def test_every_figure_by_hand(directory, tmp_path) -> None:
    assert projection.main(["--results", str(directory), "--page", str(tmp_path / "P.md")]) == 0
    text = (tmp_path / "P.md").read_text()
    work = sft_flops(CASE.model, lengths=[2560], loss_tokens=1920, train_head=True)  # three quarters are answers
    whole = 1e9 / 0.75 * sum(work.values()) / 2560
    hours = [whole / (16 * 197e12 * use) / 3600 for use in (0.5, 0.3)]
    row = next(line for line in text.splitlines() if line.startswith("| Qwen/Qwen3-0.6B | 4"))
    assert row.split(" | ")[2:4] == ["–", f"{hours[0]:.2g} – {hours[1]:.2g}"]  # 16 chips fit, 8 are not known to
    assert next(line for line in text.splitlines() if line.startswith("| Qwen/Qwen3-8B")).count("–") == 6
    assert "qwen3_0.6b on v5e-16 (75% of its memory)." in text
    assert f"a model on a processor trains 400 tokens/s (`sft.full.json`), {1e9 / 0.75 / 400 / 86400:.0f} days" in text

    per_token = sum(sft_flops(CASE.model, lengths=[1280], loss_tokens=960, train_head=True).values()) / 1280
    equal = 4e9 / 100e9 / (per_token / (197e12 * 0.5))
    computing = 1280 * per_token / (197e12 * 0.5)
    assert f"4.00 GB | 1.60× | 40 ms | {computing * 1e3:.0f} ms | 1,280 → {equal:,.0f} |" in text

    assert "| 100% | 1.0e+09 | 3.3e+06 | 5.6e+05 | `own_first` | 2.5e+09 | 2.0e+09 |" in text
    assert "| 17% | 6.0e+09 | 2.0e+07 | 3.3e+06 | `shared_first` | 1.6e+10 | 4.5e+09 |" in text

    assert "takes 3333.3 bytes for each token of an answer" in text  # 1 GB over 1000 answers of 300 tokens
    assert "3333 GB with 100% kept, 20000 GB with 17% kept" in text


def test_a_chip_sends_along_an_axis_in_both_directions() -> None:
    assert CHIPS["v5e"].ring == 100e9
    assert CHIPS["v5p"].ring == 200e9
    assert asdict(Assumptions())["chip"]["peak"] == 197e12


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        (f"{CASE.name}.json", r"no scaling\.\*\.json; run python -m benchmarks\.run --suite tpu_compile"),
        ("growth.debate.json", r"growth\.debate\.json: not a readable result"),
        ("store.json", r"store\.json: not a readable result"),
        ("dry_runs.json", r"dry_runs\.json: cannot be read .*; run python -m benchmarks\.dry_runs"),
    ],
)
def test_a_missing_result_is_named(directory, missing: str, says: str, capsys) -> None:
    (directory / missing).unlink()
    with pytest.raises(AgentArkError, match=says):
        Sources.read(directory)
    assert projection.main(["--results", str(directory), "--page", str(directory / "P.md")]) == 1
    assert not (directory / "P.md").exists()
    assert capsys.readouterr().err.startswith("error: ")


def test_measured_speeds_are_no_condition(directory) -> None:
    (directory / "sft.full.json").unlink()
    assert "For scale, measured" not in projection.page(Sources.read(directory), Assumptions())
