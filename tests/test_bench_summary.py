"""What the result files say together, and that README says the same."""

import pytest

from agentark_jax.errors import AgentArkError
from benchmarks import results, summary
from benchmarks.results import Check, Comparison, Measured, Ratio, Result, Row, Spread


def speeds(**changes) -> Result:
    row = Row("ours", "ours", Spread.of([4.0, 5.0, 6.0]), Spread.of([0.6, 0.7, 0.8]), {}, 1.0, 1.0, 2, 0.7)
    fields = {
        "benchmark": "sft.short",
        "title": "A step",
        "unit": "tokens/s",
        "quick": False,
        "model": {"name": "tiny"},
        "sizes": {},
        "rows": [row, Row("peer", "a peer", Spread.of([2.0]), None, {}, 1.0, 1.0, 2)],
        "ratios": [Ratio("ours", "peer", Spread.of([1.3, 2.5, 2.6]), 2.6)],
        "checks": [Check("difference", 0.0, 1.0)],
        "rates": {},
        "environment": results.environment(),
    }
    return Result(**{**fields, **changes})


def memory() -> Comparison:
    measured = [Measured(name, f"memory of {name}", "GB", Spread.of([1.0])) for name in ("ours", "theirs")]
    ratios = [Ratio("ours", "theirs", Spread.of([0.4]), 0.5), Ratio("ours", "theirs", Spread.of([0.9]), None)]
    return Comparison("sft_memory", "Memory", False, {"name": "tiny"}, {}, measured, ratios, [], results.environment())


def test_a_goal_is_met_by_the_median_and_what_has_none_is_not_judged():
    ratio, floor, least, free = summary.judgements([speeds(), memory()])
    assert [each.met for each in (ratio, floor, least, free)] == [False, True, True, None]
    assert summary.table([ratio, floor, least, free]).splitlines()[2:] == [
        "| A step | a peer | 2.50× (1.30× – 2.60×) | ≥ 2.60× | **missed** |",
        "| A step | the floor | 70% (60% – 80%) | ≥ 70% | met |",
        "| Memory: memory of ours | memory of theirs | 0.40× (0.40× – 0.40×) | ≤ 0.50× | met |",
    ]


def test_quick_results_are_not_told_as_results(tmp_path):
    for result in (speeds(), speeds(quick=True), memory()):
        results.write(result, tmp_path)
    assert [(found.benchmark, found.quick) for found in summary.load(tmp_path)] == [
        ("sft.short", False),
        ("sft_memory", False),
    ]
    assert "### A step" in summary.page(summary.load(tmp_path))


def test_the_plot_has_a_bar_for_every_peer():
    axes = summary.plot(list(summary.judgements([speeds(), memory()]))).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A step – a peer"]
    assert axes.patches[0].get_width() == 2.5


def test_text_goes_between_the_marks_only():
    readme = f"before\n{summary.BEGIN}old\n{summary.END}after\n"
    assert summary.inserted(readme, "new\n") == f"before\n{summary.BEGIN}new\n{summary.END}after\n"
    with pytest.raises(AgentArkError, match="marks"):
        summary.inserted("no marks", "new\n")


def test_readme_and_the_page_say_what_the_result_files_say():
    found = summary.load(summary.DIRECTORY)
    readme = summary.README.read_text(encoding="utf-8")
    assert summary.inserted(readme, summary.table(list(summary.judgements(found)))) == readme
    assert summary.PAGE.read_text(encoding="utf-8") == summary.page(found)
