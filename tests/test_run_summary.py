"""`summary.md`: complete, the same for the same results, and what others wrote is no markup in it."""

import copy
import re

import pytest
from test_attribution import attributed, seed_run
from test_report import HOSTILE, full_results

from agentark_jax.errors import AgentArkError
from agentark_jax.report import words
from agentark_jax.report.summary import run_summary


@pytest.fixture(scope="module")
def given() -> dict:
    seeds = [seed_run(seed, base=0.2, student=0.7, gold=0.4) for seed in range(2)]
    return full_results() | {"attribution": attributed(seeds)}


def section(text: str, title: str) -> str:
    return re.split(r"\n## ", text.split(f"## {title}\n", 1)[1], maxsplit=1)[0]


def test_it_states_every_part_with_intervals_and_counts(given):
    told = run_summary(given)
    plain = told.replace("\\", "")
    for sentence in given["attribution"]["conclusion"]:
        assert sentence in section(plain, "What came out")
    for arm in given["arms"].values():
        row = next(line for line in plain.splitlines() if line.startswith(f"| {arm['label']} |"))
        assert f"{words.percent(arm['accuracy'])} {words.interval(arm['low'], arm['high'])} | {arm['n']}" in row
    learned = section(plain, "What the arms learned from")
    for arm in given["attribution"]["arms"]:
        assert f"| {arm['label']} |" in learned
    assert "| 50 rollouts |" in learned
    assert "| base | nothing more | base | – |" in learned
    contrasts = section(plain, "Contrasts")
    for contrast in given["attribution"]["contrasts"]:
        assert f"*{contrast['asks']}* {contrast['sentence']}." in contrasts
    assert "Across 2 seeds: [" in contrasts
    for row in given["attribution"]["break_even"]:
        assert row["sentence"] in section(plain, "Break-even")
    assert given["run"]["command"] in section(plain, "Where it comes from")
    assert "- git revision: not recorded" in told
    assert "- seeds: 0\n" in told
    assert run_summary(copy.deepcopy(given)) == told


def test_checks_of_the_harness_are_told_apart(given):
    checks = [{"name": "A/A", "passed": True, "sentence": "A/A: no effect, as there should be"}]
    told = run_summary(given | {"checks": checks})
    assert "- A/A: no effect, as there should be" in section(told, "Checks of the harness")


def test_a_run_without_arms_tells_its_comparisons():
    told = run_summary({key: value for key, value in full_results().items() if key != "attribution"})
    assert "## Break-even" not in told
    for difference in full_results()["differences"]:
        assert f"- {difference['sentence']}" in section(told, "Comparisons")


def test_what_others_wrote_is_no_markup(given):
    hostile = copy.deepcopy(given)
    hostile["run"]["name"] = hostile["task"]["name"] = hostile["model"]["name"] = HOSTILE
    hostile["attribution"]["arms"][1]["label"] = hostile["arms"]["student"]["label"] = HOSTILE
    hostile["run"]["command"] = "`rm` " + HOSTILE
    told = run_summary(hostile)
    outside = re.sub(r"`[^`]*`", "", told)
    assert not re.search(r"(?<!\\)[<>]", outside)
    assert not re.search(r"(?<!\\)\[red", outside)
    assert told.count("\n# ") == 0
    assert "\x1b" not in told
    assert "\x00" not in told
    tables = [line for line in told.splitlines() if line.startswith("| ")]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
    assert bars == {6, 9}


def test_another_schema_is_refused(given):
    with pytest.raises(AgentArkError, match="schema"):
        run_summary(given | {"schema": 99})
