"""The report: escaped, self-contained, deterministic, complete with parts missing, small, readable at 80 columns."""

import base64
import copy
import csv
import gzip
import hashlib
import io
import json
import random
import re
import urllib.parse
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from report_results import HOSTILE, arm, difference, full_results, poisoned, realistic, transcript
from rich.console import Console
from statsmodels.stats.proportion import proportion_confint

from agentark_jax.errors import AgentArkError
from agentark_jax.report import labels, plots, transcripts, words
from agentark_jax.report.attribution import scale
from agentark_jax.report.card import model_card
from agentark_jax.report.page import render, write_report
from agentark_jax.report.svg import draw
from agentark_jax.report.terminal import summary_table


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


def packed(html: str) -> dict:
    """What the page's script reads."""
    return json.loads(gzip.decompress(base64.b64decode(Page(html).scripts[0], validate=True)))


@pytest.fixture(scope="module")
def html() -> str:
    return render(full_results(), [transcript(index) for index in range(3)])


def test_hostile_text_stays_text():
    results = poisoned(full_results())
    results["schema"] = 1
    html = render(results, [poisoned(transcript(0))])
    shown = Page(html)
    allowed = {
        "html", "head", "meta", "title", "link", "style", "body", "header", "main", "section", "footer", "nav", "h1",
        "h2", "h3", "p", "a", "div", "span", "b", "i", "u", "br", "table", "thead", "tbody", "tr", "th", "td", "figure",
        "figcaption", "details", "summary", "dl", "dt", "dd", "code", "noscript", "input", "button", "script",
        "ul", "li", "label", "select", "option", "pre",
        "svg", "g", "path", "text", "use", "defs", "clippath", "rect", "tspan",
    }  # fmt: skip
    assert {tag for tag, _ in shown.elements} <= allowed
    assert not [name for _, attributes in shown.elements for name in attributes if name.startswith("on")]
    assert len(shown.scripts) == 2
    assert "alert" not in shown.scripts[1]
    data = packed(html)
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


def test_headline_has_student_base_difference_and_debate(html):
    assert (
        "Debate student 51.0 % [41.2, 60.8] n = 96 Base model 42.7 % [33.3, 52.7] n = 96 "
        "Debate student − Base model +8.3 points [+1.0, +16.0] n = 96 ▲ higher Debate, 3 agents × 2 rounds 47.9 % "
    ) in Page(html).words
    results = full_results()
    results["differences"] = []
    assert [tile["name"] for tile in words.headline(results)] == ["Base model", "Debate, 3 agents × 2 rounds"]


def test_summary_says_what_was_done():
    results = full_results()
    assert words.work_done(results) == (
        "The model is Gemma 3 270M (268 M parameters, 100 M of them trained), warm-started on 150 questions of the "
        "task chains. 3 copies debated 48 further questions over 2 rounds (288 answers). From it, and to compare with, "
        "1 student learned: “Debate student”. Every arm was measured on 96 questions kept apart, or on a stated subset "
        "of them."
    )
    results["run"]["seeds"] = [0, 1]
    assert words.work_done(results).endswith("All of this was done 2 times, with other random numbers.")


def test_what_checks_the_harness_is_no_result():
    results = full_results()
    results["arms"]["twin"] = results["arms"]["student"] | {"label": "check: twin", "accuracy": 0.9, "check": True}
    results["training"]["twin"] = results["training"]["student"]
    assert words.work_done(results) == words.work_done(full_results())
    before, plot = (plots.accuracy_tokens(each["arms"]) for each in (full_results(), results))
    assert before is not None
    assert plot is not None
    assert plot.rows == before.rows


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
    del results["attribution"]
    results["differences"][0] |= {"p_value": 0.0312, "p_holm": 0.0624}
    assert words.outcome(results["differences"][0]) == "null"
    assert words.finding(results, results["differences"][0]) == (
        "“Debate student” came out 8.3 points above “Base model” [+1.0, +16.0], n = 96; after Holm's correction for "
        "3 comparisons (p = 0.062) no difference is shown."
    )
    shown = Page(render(results, [])).words
    assert "0.031 0.062" in shown
    assert "Holm's correction for all 3 of this table." in shown
    assert "▲ higher" not in shown
    assert "▲ higher" in Page(render(full_results(), [])).words
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(summary_table(results))
    assert [line[0] for line in out.getvalue().splitlines() if line[:1] in {*"▲▼○"}] == ["○", "○", "▼"]


def test_attribution_says_what_each_arm_learned_and_each_contrast_asks(html):
    text = Page(html).words
    for fragment in (
        "1 of 2 contrasts shows a difference. Peers are needed.",
        "Debate student what Debate student learns yes 88 5,000 1,000 50.0 [40.0, 60.0], n 96 over base +8.3 [+1.0,",
        "20,480 rollouts",
        "Debate student − Single-agent student at equal tokens ○ no difference shown matched Does debate help?",
        "the same 85 questions (3 given up), of equally many tokens and of lengths alike (smallest p = 0.93): “Debate "
        "student” 5,000, “Single-agent student at equal tokens” 5,010.",
        "differ. 0.0 +1.0 [−2.0, +4.0], n 96 ✓ as expected", "+5.0 +1.0 [−2.0, +3.0], n 96 ✗ not as expected",
        "1.2 M", "1,380 questions 1,200 to no end", "never",
    ):  # fmt: skip
        assert fragment in text, fragment
    places = [
        text.index(kind)
        for kind in ("Where all of them start", "Learns without", "Learns from a debate", "Learns from re")
    ]
    assert places == sorted(places)


def test_differences_lie_on_a_round_axis_with_seeds_and_a_band_of_what_is_too_small(html):
    shown = html[html.index('id="attribution"') :]
    # Of the axis from −20 to +20 points: zero is at 50 %, +8.3 at 70.75 %, what is below 10.5 points ends at 23.75 %.
    assert 'class="reach" style="left:23.75%;right:23.75%"' in shown
    assert '<b style="left:70.75%">' in shown
    assert 'class="seed" style="left:62.50%"' in shown
    assert "The axis goes from −20 to +20 points." in shown  # for phones, where the table has no head
    assert scale([]) == 0.02
    assert scale([{"low": -0.04, "high": None, "per_seed": [0.07]}]) == 0.1
    assert scale([{"low": -3.0, "high": 3.0}]) == 1.0
    near = [{"low": -0.04, "high": 0.01}] * 4
    assert scale([*near, {"low": -0.47, "high": -0.42}]) == 0.05
    assert scale([*near, {"low": -0.10, "high": -0.02}]) == 0.1


def test_a_difference_beyond_the_axis_is_an_arrow_at_its_end():
    results = full_results()
    results["differences"] = [difference("student", "base", 0.0, -0.01, 0.02) for _ in range(4)]
    results["differences"].append(difference("single", "base", -0.44, -0.47, -0.42))
    shown = render(results, [])
    assert shown.count('<b class="below" style="left:0.00%">') == 1
    assert '<i style="left:0.00%;right:100.00%">' in shown


def test_configuration_is_shown_and_downloads(html):
    link = next(a for _, a in Page(html).elements if a.get("download") == "config.yaml")
    assert urllib.parse.unquote(link["href"].split(",", 1)[1]) == "model:\n  source: somewhere\narms:\n- single\n"
    assert "model: source: somewhere arms: - single" in Page(html).words


def test_plot_data_downloads(html):
    links = [a for _, a in Page(html).elements if "download" in a]
    tables = {
        a["download"]: list(csv.DictReader(io.StringIO(urllib.parse.unquote(a["href"].split(",", 1)[1]))))
        for a in links
        if a["download"].endswith(".csv")
    }
    assert {
        "attribution-arms", "attribution-contrasts", "break-even", "checks", "arms", "differences", "flips", "funnel",
        "training", "ledger", "accuracy-tokens", "debate-rounds", "losses", "curve-0", "curve-1",
    } == {name.removesuffix(".csv") for name in tables}  # fmt: skip
    assert len(tables["losses.csv"]) == 1010
    assert tables["attribution-contrasts.csv"][0]["per_seed"] == "0.05 0.1"
    assert tables["arms.csv"][1]["tokens_per_question.total"] == "92.3"
    assert [row["queries"] for row in tables["break-even.csv"]] == ["1379.8", ""]
    assert "history" not in tables["training.csv"][0]
    assert float(tables["accuracy-tokens.csv"][1]["accuracy"]) == 49 / 96
    assert {row["n"] for row in tables["curve-0.csv"]} == {"32"}
    full = next(a["href"] for a in links if a["download"] == "results.json")
    assert json.loads(urllib.parse.unquote(full.split(",", 1)[1])) == full_results()


@pytest.mark.parametrize(
    "gone",
    [
        ("curves",),
        ("debate", "counts"),
        ("training", "differences", "timing", "per_seed"),
        ("attribution", "checks"),
    ],
)
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


@pytest.fixture(scope="module")
def large() -> str:
    """The report of 10,000 answers (and 3,334 of arms) of 150 tokens and more."""
    return render(full_results(), [realistic(index) for index in range(1667)])


def test_ten_thousand_turns_fit(large):
    data = packed(large)
    assert sum(len(turns) for item in data["items"] for turns in item["rounds"]) >= 10_000
    assert len(json.dumps(data)) > 8_000_000
    assert len(large.encode()) < 10_000_000
    assert "the rest are in the run" not in large


def test_too_long_transcripts_are_left_out_and_said(monkeypatch):
    items = [transcript(index, text=random.Random(index).randbytes(200).hex()) for index in range(20)]
    for limit, bytes_ in (("PACKED_BYTES", 4_000), ("PLAIN_BYTES", 10_000)):
        with monkeypatch.context() as patched:
            patched.setattr(transcripts, limit, bytes_)
            html = render(full_results(), items)
        kept = len(packed(html)["items"])
        size = Page(html).scripts[0]
        assert 0 < kept < 20
        assert len(size if limit == "PACKED_BYTES" else gzip.decompress(base64.b64decode(size))) <= bytes_
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


def test_the_front_of_accuracy_against_tokens_is_marked():
    assert plots.pareto_front([(91, 0.4), (92, 0.5), (92, 0.6), (500, 0.6), (900, 0.7), (950, 0.1)]) == [0, 2, 4]
    assert plots.pareto_front([(1, 0.5), (1, 0.5), (2, 0.5)]) == [0]
    plot = plots.accuracy_tokens(full_results()["arms"])
    assert plot is not None
    assert [row[-1] for row in plot.rows] == ["no", "yes", "yes", "no", "no"]
    assert "“Single-agent student at equal tokens”, “Debate student”." in plot.caption


def test_checks_are_neither_on_the_front_nor_students_that_learned():
    results = full_results()
    check = results["arms"]["student"] | {"label": "Planted", "accuracy": 1.0, "high": 1.0, "check": True}
    results["arms"]["planted"] = check
    results["training"]["planted"] = next(iter(results["training"].values()))
    plot = plots.accuracy_tokens(results["arms"])
    assert "Planted" not in plot.caption
    assert "Planted" not in [row[0] for row in plot.rows]
    assert words.work_done(results) == words.work_done(full_results())


def test_a_model_without_a_name_is_a_model():
    results = full_results()
    results["model"] |= {"name": "small Qwen3-shaped model", "source": "scratch"}
    assert words.work_done(results).startswith("The model is a small Qwen3-shaped model (")


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
