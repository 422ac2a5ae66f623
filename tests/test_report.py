"""The report: escaped, self-contained, deterministic, complete with parts missing, small, readable at 80 columns."""

import base64
import copy
import csv
import hashlib
import io
import json
import re
import urllib.parse
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from statsmodels.stats.proportion import proportion_confint

from agentark_jax.errors import AgentArkError
from agentark_jax.report import labels, page, plots, words
from agentark_jax.report.card import model_card
from agentark_jax.report.page import render, write_report
from agentark_jax.report.svg import draw
from agentark_jax.report.terminal import summary_table

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" 'single' & $\\frac{1}{0}$ {{ 7 * 7 }} "
    "[red]markup[/red] <!-- http://example.com/x.png ]]> \x00\x1b[31m \u2028 \ud800 字"
)


def arm(label: str, correct: int, n: int, tokens: float, protocol: str = "single", model: str = "base") -> dict:
    low, high = words.wilson(correct, n)
    return {
        "label": label, "description": f"what {label} is", "protocol": protocol, "model": model,
        "accuracy": correct / n, "low": low, "high": high, "correct": correct, "n": n,
        "questions": "all" if n == 96 else "subset", "unparseable": 2, "calls_per_question": 1.0,
        "tokens_per_question": {"prompt": tokens / 2, "completion": tokens / 2, "total": tokens},
        "cost_ratio": tokens / 91,
    }  # fmt: skip


def test_what_the_best_pick_would_come_to_stands_beside_what_the_vote_did():
    results = full_results()
    assert "right: " not in Page(render(results, [])).words
    low, high = words.wilson(75, 96)
    results["arms"]["debate"]["oracle"] = {
        "accuracy": 75 / 96,
        "low": low,
        "high": high,
        "correct": 75,
        "n": 96,
        "answers": 3.0,
    }
    assert f"any of 3 right: 78.1 {words.interval(low, high)}" in Page(render(results, [])).words


def difference(
    a: str, b: str, value: float, low: float, high: float, p_value: float = 0.01, p_holm: float = 0.02
) -> dict:
    return {
        "name": f"{a}_{b}", "a": a, "b": b, "difference": value, "low": low, "high": high, "n": 96, "p_value": p_value,
        "p_holm": p_holm, "level": 0.95,
        "minimum_detectable": 0.105, "sentence": f"{a} against {b} in a sentence.", "seed_low": None, "seed_high": None,
    }  # fmt: skip


def full_results() -> dict:
    flips = {"right→right": 46, "wrong→right": 17, "right→wrong": 9, "wrong→wrong": 72}
    history = [[step, 1.0 / step] for step in range(1, 1001)]
    return {
        "schema": 1,
        "run": {
            "name": "quickstart", "seeds": [0], "git": None, "fingerprint": "6f1d", "versions": {"jax": "0.10.2"},
            "command": "python -m agentark_jax.train --config configs/quickstart.yaml",
        },
        "model": {"source": "somewhere", "name": "Gemma 3 270M", "parameters": 268098176, "trainable": 100326016},
        "task": {"name": "chains", "path": None, "questions": {"warm_start": 150, "debate": 48, "held_out": 96}},
        "arms": {
            "base": arm("Base model", 41, 96, 91.2),
            "student": arm("Debate student", 49, 96, 92.3, model="student"),
            "single": arm("Single-agent student at equal tokens", 46, 96, 90.4, model="single"),
            "vote": arm("Majority vote of 5", 24, 48, 456, "vote"),
            "debate": arm("Debate, 3 agents × 2 rounds", 23, 48, 962, "debate"),
        },
        "differences": [
            difference("student", "base", 0.083, 0.01, 0.16),
            difference("student", "single", 0.031, -0.042, 0.104, 0.4, 0.4),
            difference("debate", "vote", -0.2, -0.3, -0.1),
        ],
        "counts": {"student": [{"filter": "graded right", "kept": 118, "dropped": 170}]},
        "debate": {
            "agents": 3, "rounds": 2, "turns": 288,
            "accuracy_by_round": [
                {"round": k, "accuracy": 0.4, "low": 0.3, "high": 0.5, "n": 144, "majority": 0.45, "agreement": 0.6}
                for k in (1, 2)
            ],
            "flips": [{"from_round": 1, "to_round": 2, **flips}],
        },
        "training": {
            "student": {
                "examples": 88, "steps": 1000, "tokens": 9000, "loss_tokens": 5000, "final_loss": 0.001,
                "history": history, "validation": history[99::100],
            }
        },
        "curves": {
            "difficulty": {
                "title": "By difficulty", "x": "steps", "y": "accuracy",
                "series": [
                    {"name": "base", "points": [{"x": x, "y": 0.5 / x, "low": 0.4 / x, "high": 0.6 / x, "n": 32}
                                                for x in (1, 2, 3)]}
                ],
            },
            "kinds": {
                "title": "By kind", "x": "kind", "y": "loss",
                "series": [{"name": "base", "points": [{"x": "sum", "y": 1.5, "low": 1.0, "high": 2.0, "n": 9}]}],
            },
        },
        "per_seed": [],
        "timing": {
            "total_seconds": 742.3,
            "stages": [
                {"stage": "model", "seconds": 8.0, "tokens": 0, "tokens_per_second": None, "reused": True},
                {"stage": "debate", "seconds": 100.0, "tokens": 41000, "tokens_per_second": 410.0, "reused": False},
            ],
        },
    }  # fmt: skip


def transcript(index: int, agents: int = 3, rounds: int = 2, text: str = "3 + 4 = 7. The answer is 7.") -> dict:
    return {
        "id": f"{index:024x}", "question": f"Question {index}?", "gold": "7", "rationale": "3 + 4 = 7.", "steps": 1,
        "final_answer": "7", "final_verdict": "right",
        "rounds": [
            [
                {"agent": agent, "text": text, "answer": "7", "verdict": "right", "tokens": 12,
                 "flip": "wrong→right" if turn else None}
                for agent in range(1, agents + 1)
            ]
            for turn in range(rounds)
        ],
        "answers": {"base": {"text": text, "answer": "7", "verdict": "right"}},
    }  # fmt: skip


def poisoned(value: object) -> object:
    """`value` with every free text in it made hostile; the words of the schema stay."""
    if isinstance(value, dict):
        kept = ("protocol", "model", "questions", "verdict", "final_verdict", "flip", "a", "b")
        return {key: item if key in kept and isinstance(item, str) else poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


class Page(HTMLParser):
    """Elements, attributes, scripts and visible text of a page; checks that elements nest."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def html() -> str:
    return render(full_results(), [transcript(index) for index in range(3)])


def test_hostile_text_stays_text():
    results = poisoned(full_results())
    results["schema"] = 1
    shown = Page(render(results, [poisoned(transcript(0))]))
    allowed = {
        "html", "head", "meta", "title", "link", "style", "body", "header", "main", "section", "footer", "nav", "h1",
        "h2", "h3", "p", "a", "div", "span", "b", "i", "u", "br", "table", "thead", "tbody", "tr", "th", "td", "figure",
        "figcaption", "details", "summary", "dl", "dt", "dd", "code", "noscript", "input", "button", "script",
        "svg", "g", "path", "text", "use", "defs", "clippath", "rect", "tspan",
    }  # fmt: skip
    assert {tag for tag, _ in shown.elements} <= allowed
    assert not [name for _, attributes in shown.elements for name in attributes if name.startswith("on")]
    assert len(shown.scripts) == 2
    assert "alert" not in shown.scripts[1]
    data = json.loads(shown.scripts[0])
    assert data["items"][0]["question"] == "Question 0?" + HOSTILE.replace("\ud800", "\ufffd")
    assert "alert(1)" in shown.words
    assert "{{ 7 * 7 }}" in shown.words


def test_page_loads_nothing(html):
    for tag, attributes in Page(html).elements:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    assert "http://" not in html
    assert "https://" not in html
    assert not re.search(r"@import|url\((?!#)", html)


def test_policy_allows_the_pages_script_only(html):
    shown = Page(html)
    policy = next(a["content"] for t, a in shown.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(shown.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in shown.scripts[1]


def test_ids_are_unique_and_references_resolve(html):
    elements = Page(html).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {a["href"][1:] for _, a in elements if (a.get("href") or "").startswith("#")}
    clips = {a["clip-path"][5:-1] for _, a in elements if "clip-path" in a}
    assert links | clips <= set(ids)


def test_same_input_same_bytes(tmp_path: Path):
    paths = [tmp_path / name for name in ("a.html", "b.html")]
    for path in paths:
        write_report(path, full_results(), [transcript(0)])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths


def test_numbers_reach_the_page(html):
    text = Page(html).words
    for fragment in ("51.0 [41.2, 60.8]", "49 / 96", "[+1.0, +16.0]", "no difference shown", "graded right", "118",
                     "19.1 % [12.3, 28.5]", "12 min 22 s", "subset"):  # fmt: skip
        assert fragment in text


def test_summary_says_what_came_out():
    results = full_results()
    better, null, worse = (words.finding(results, item) for item in results["differences"])
    assert "8.3 points above “Base model”" in better
    assert "zero" not in better
    assert "no difference is shown (smallest detectable: 10.5 points)" in null
    assert "20.0 points below" in worse
    assert [words.outcome(item) for item in results["differences"]] == ["better", "null", "worse"]


def test_what_holm_takes_back_is_not_called_a_difference():
    results = full_results()
    results["differences"][0] |= {"p_value": 0.0312, "p_holm": 0.0624}
    assert words.outcome(results["differences"][0]) == "null"
    assert words.finding(results, results["differences"][0]) == (
        "“Debate student” came out 8.3 points above “Base model” [+1.0, +16.0], n = 96; after Holm's correction for "
        "3 comparisons (p = 0.062) no difference is shown."
    )
    shown = Page(render(results, [])).words
    assert "0.031 0.062" in shown
    assert "Holm's correction for all 3 of this report" in shown
    assert "▲ higher" not in shown
    assert "▲ higher" in Page(render(full_results(), [])).words
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(summary_table(results))
    assert [line[0] for line in out.getvalue().splitlines() if line[:1] in {*"▲▼○"}] == ["○", "○", "▼"]


def test_plot_data_downloads(html):
    links = [a for _, a in Page(html).elements if "download" in a]
    tables = {
        a["download"]: list(csv.DictReader(io.StringIO(urllib.parse.unquote(a["href"].split(",", 1)[1]))))
        for a in links
        if a["download"].endswith(".csv")
    }
    assert len(tables["losses.csv"]) == 1010
    assert float(tables["accuracy-tokens.csv"][1]["accuracy"]) == 49 / 96
    assert {row["n"] for row in tables["curve-0.csv"]} == {"32"}
    full = next(a["href"] for a in links if a["download"] == "results.json")
    assert json.loads(urllib.parse.unquote(full.split(",", 1)[1])) == full_results()


@pytest.mark.parametrize("gone", [("curves",), ("debate", "counts"), ("training", "differences", "timing", "per_seed")])
@pytest.mark.parametrize("how", ["absent", "empty"])
def test_missing_parts(gone, how):
    results = full_results()
    for key in gone:
        if how == "absent":
            del results[key]
        else:
            results[key] = type(results[key])()
    shown = Page(render(results, [] if "debate" in gone else [transcript(0)]))
    linked = {a["href"][1:] for t, a in shown.elements if t == "a" and a["href"].startswith("#")}
    assert linked <= {a.get("id") for _, a in shown.elements}
    assert "None" not in shown.words
    assert "Undefined" not in shown.words
    Console(file=io.StringIO(), width=80).print(summary_table(results))
    assert "# quickstart" in model_card(results, "student")


def test_judges_are_shown_with_intervals_where_they_were_stored():
    def share(value: float) -> dict:
        return {"mean": value, "low": value - 0.1, "high": value + 0.1, "n": 40}

    over = {"difference": 0.05, "low": -0.02, "high": 0.11}
    calibration = {"brier": 0.1, "expected_error": 0.05, "n": 300}
    errors = {"located": share(0.4), "cleared": share(0.8), "f1_interval": [0.4213, 0.6498]}
    found = {
        "prm": {"errors": errors, "f1": 0.5333, "calibration": calibration, "model_over": None, "f1_over": None},
        "majority": {"model_over": over, "f1_over": {"difference": 0.1234, "low": 0.0211, "high": 0.2249}},
        "length-only": {"model_over": over, "f1_over": {"difference": 0.0321, "low": None, "high": None}},
    }
    judge = {"seed": 0, "first_errors": found, "outcome": {"auc": None}, "best_of_n": [{"over_majority": over, "n": 3}]}
    results = full_results() | {"judges": {"prm": [judge]}}
    text = Page(render(results, [])).words
    assert "53.3 [42.1, 65.0]" in text
    assert "F1 +12.3 [+2.1, +22.5]" in text
    assert "F1 +3.2" in text
    # Of a run that was before them.
    del errors["f1_interval"], found["majority"]["f1_over"], found["length-only"]["f1_over"]
    old = Page(render(results, [])).words
    assert "53.3" in old
    assert "42.1" not in old
    assert "F1 +" not in old


def test_seeds_are_shown():
    results = full_results()
    results["run"]["seeds"] = [0, 1]
    results["per_seed"] = [
        {"seed": seed, "arms": {"base": 0.40 + 0.02 * seed}, "directory": f"seed{seed}"} for seed in (0, 1)
    ]
    results["differences"][0] |= {"seed_low": -0.05, "seed_high": 0.2}
    text = Page(render(results, [])).words
    assert "40.0 42.0 41.0 40.0 to 42.0 (2 seeds)" in text
    assert "seeds [−5.0, +20.0]" in text


def test_ten_thousand_turns_fit():
    text = "First we add 12 and 30, which gives 42; then we “double” it. " * 8
    items = [transcript(index, agents=5, rounds=4, text=text) for index in range(500)]
    html = render(full_results(), items)
    assert len(html.encode()) < 10_000_000
    assert len(json.loads(Page(html).scripts[0])["items"]) == 500


def test_too_long_transcripts_are_left_out_and_said(monkeypatch):
    monkeypatch.setattr(page, "TRANSCRIPT_BYTES", 5_000)
    html = render(full_results(), [transcript(index) for index in range(20)])
    data = Page(html).scripts[0]
    kept = len(json.loads(data)["items"])
    assert 0 < kept < 20
    assert len(data.encode()) <= 5_000
    assert f"The first {kept} of 20 questions" in Page(html).words


def test_terminal_fits_80_columns():
    results = full_results()
    results["arms"]["base"]["label"] = "[red]" + "long label " * 20
    results["differences"][0]["sentence"] = "[bold]a sentence[/bold] \x1b[2J " * 12
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(summary_table(results))
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    for fragment in ("[red]", "51.0 [41.2, 60.8]", "48*", "10.57×", "12 min 22 s", "41,000 tokens", "410 tokens/s"):
        assert fragment in text


def test_model_card_escapes_and_names_the_arm():
    results = full_results()
    results["arms"]["student"]["label"] = "a|b <b>`x`\n# heading"
    card = model_card(results, "student")
    assert "\n# heading" not in card
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [6] * 6
    assert "88 examples" in card
    with pytest.raises(AgentArkError, match="no arm 'nobody'"):
        model_card(results, "nobody")


def test_errors_name_file_and_fix(tmp_path: Path):
    results = full_results()
    with pytest.raises(AgentArkError, match="schema is 2"):
        write_report(tmp_path / "a.html", results | {"schema": 2}, [])
    del results["arms"]
    with pytest.raises(AgentArkError, match=r"results\.json: arms missing"):
        write_report(tmp_path / "a.html", results, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(AgentArkError, match="cannot be written"):
        write_report(tmp_path / "file" / "a.html", full_results(), [])
    (tmp_path / "folder").mkdir()
    with pytest.raises(AgentArkError, match="cannot be written"):
        write_report(tmp_path / "folder", full_results(), [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("count", [1, 5, 12])
def test_labels_do_not_overlap(count):
    """Also with arms of equal tokens and accuracy, on a laptop and on a phone."""
    spots = [(90.0 + index % 3, 0.5 + 0.01 * (index // 3), 0.4, 0.6) for index in range(count)]
    found = []

    def paint(canvas):
        canvas.axes.set_xscale("log")
        canvas.axes.set_xlim(50, 200)
        canvas.axes.set_ylim(0.3, 0.7)
        found.append(labels.place(canvas, [f"A rather long name of arm {index}" for index in range(count)], spots))

    draw("x", paint, 900, 680)
    for boxes in found:
        assert boxes is not None
        assert len(boxes) == count
        for index, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def test_every_arm_is_labelled():
    arms = {f"arm{index}": arm(f"Arm number {index}", 40 + index % 2, 96, 90 + index) for index in range(12)}
    plot = plots.accuracy_tokens(arms)
    assert plot is not None
    for drawing in (plot.wide, plot.narrow):
        text = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", drawing))
        assert all(re.search(rf"Arm number {index}\b", text) for index in range(12))
        assert "#000" not in drawing


def test_long_histories_are_thinned_without_losing_spikes():
    history = [[step, 100.0 if step == 5000 else 1.0] for step in range(10_000)]
    thin = plots._thin(history)
    assert len(thin) <= 400
    assert max(value for _, value in thin) > 4
    assert all(first[0] < second[0] for first, second in pairwise(thin))


@pytest.mark.parametrize(("right", "total"), [(0, 10), (41, 96), (10, 10), (1, 1)])
def test_wilson(right, total):
    assert words.wilson(right, total) == pytest.approx(proportion_confint(right, total, method="wilson"), abs=1e-9)


def test_input_is_not_changed():
    results, items = full_results(), [transcript(0)]
    before = copy.deepcopy((results, items))
    render(results, items)
    assert (results, items) == before
