"""Debates that others held: imported as text, labelled, and turned into every variant."""

import json
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from real_server import make_model
from test_traces_cli import cells

from agentark_jax.cli import main
from agentark_jax.data.chat import make_format
from agentark_jax.data.config import PromptConfig
from agentark_jax.data.render import dialogue_example
from agentark_jax.records import stable_hash
from agentark_jax.tasks.grading import grader
from agentark_jax.traces.config import Variant
from agentark_jax.traces.selection import load_selection
from agentark_jax.traces.store import TraceStore

TRANSCRIPTS = Path(__file__).parents[1] / ".." / "shared" / "data" / "debate_medmcqa"
ROWS = [
    {
        "q": {"text": "2 + 3?"},
        "gold": "#### 5",
        "said": [["The answer is 4.", "The answer is 5.", None], ["The answer is 5.", "The answer is 5."]],
    },
    {"q": {"text": "1 + 1?"}, "gold": "2", "said": [["The answer is 3.", "no idea", "The answer is 2."]]},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model") / "model", 0))


def run(*arguments: object) -> int:
    return main(["traces", *map(str, arguments)])


def bring(path: Path, out: Path, tokenizer: str, *options: str) -> int:
    columns = ("--question", "q.text", "--answer", "gold", "--rounds", "said")
    return run("import", path, out, "--model", "theirs", "--tokenizer", tokenizer, *columns, *options)


def test_a_debate_is_imported_once_as_text(tmp_path, tokenizer, capsys):
    (tmp_path / "debates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = tmp_path / "out.sqlite"
    for _ in range(2):
        assert bring(tmp_path / "debates.jsonl", out, tokenizer) == 0
    with TraceStore(out, read_only=True) as store:
        assert store.verify() == []
        turns = {(turn.call.question_id, turn.call.round, turn.call.agent): turn for turn in store.turns()}
        assert {question.prompt: question.answer for question in store.questions()} == {"2 + 3?": "5", "1 + 1?": "2"}
    assert len(turns) == 7
    assert all(turn.completion.text_only for turn in turns.values())
    assert {turn.call.model for turn in turns.values()} == {"theirs"}
    first = {place[2]: turn.key for place, turn in turns.items() if place[1] == 0 and turn.completion.text[-2] in "45"}
    later = [turn for place, turn in turns.items() if place[1] == 1]
    assert [set(turn.call.parents) for turn in later] == [set(first.values())] * 2
    assert run("label", out, "--grader", "numeric") == 0
    (row,) = cells(capsys.readouterr().out)
    assert row == ["numeric-2", "7", "4", "2", "1"]
    assert run("select", out, "--grader", "numeric", "--out", tmp_path / "chosen", "--per-question", 3) == 0
    manifest = json.loads((tmp_path / "chosen" / "manifest.json").read_text())["variants"]
    assert list(manifest) == [variant for variant in get_args(Variant) if variant != "summary"], "nobody summarised"
    assert {name: figures["trajectories"] for name, figures in manifest.items() if "corrective" in name} == {
        "corrective_first": 2,
        "corrective_only": 1,
        "non_corrective_matched": 1,
    }
    (corrected,) = load_selection(tmp_path / "chosen" / "corrective_only.parquet").trajectories
    assert corrected.logprobs is None
    assert len(corrected.trace_keys) == 2
    assert manifest["corrective_only"]["yield"] == 1 / 7
    arguments = ("--grader", "numeric", "--out", tmp_path / "chosen", "--variant")
    assert run("select", out, *arguments, "summary") == 2
    assert "set debate.aggregation to summariser" in capsys.readouterr().err


def test_of_a_run_only_its_own_debate_is_learned_from(tmp_path, tokenizer):
    """Its store has debates on held-out questions, too, and controls' on the same ones."""
    (tmp_path / "debates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    store = tmp_path / "run" / "traces.sqlite"
    store.parent.mkdir()
    assert bring(tmp_path / "debates.jsonl", store, tokenizer) == 0
    assert run("label", store, "--grader", "numeric") == 0
    with TraceStore(store, read_only=True) as opened:
        turns = list(opened.turns())
        wanted = next(question.id for question in opened.questions() if question.prompt == "2 + 3?")
    (tmp_path / "run" / "debate").mkdir()
    listed = [turn.key for turn in turns if turn.call.question_id == wanted]
    (tmp_path / "run" / "debate" / "keys.json").write_text(json.dumps(listed))
    arguments = ("--grader", "numeric", "--out", tmp_path / "chosen", "--variant", "random")
    assert run("select", tmp_path / "run", *arguments) == 0
    chosen = load_selection(tmp_path / "chosen" / "random.parquet").trajectories
    assert {t.question_id for t in chosen} == {wanted}


def test_a_round_hears_the_round_before_it_alone(tmp_path, tokenizer):
    """A dialogue of the third round tells the second, not the first; who was silent there is not made to speak."""
    rounds = [["The answer is 1.", "The answer is 2."], ["The answer is 3.", None, "The answer is 4."]]
    last = ["So the answer is 5.", "Hence the answer is 5."]
    row = {"q": {"text": "2 + 3?"}, "gold": "5", "said": [*rounds, last]}
    (tmp_path / "debates.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "out.sqlite"
    assert bring(tmp_path / "debates.jsonl", out, tokenizer) == 0
    assert run("label", out, "--grader", "numeric") == 0
    arguments = ("--grader", "numeric", "--out", tmp_path / "chosen", "--variant", "dialogue")
    assert run("select", out, *arguments) == 0
    with TraceStore(out, read_only=True) as store:
        turns = {turn.key: turn for turn in store.turns()}
        (question,) = store.questions()
    heard = [
        [(turns[key].call.round, turns[key].call.agent) for key in turn.call.parents]
        for turn in sorted(turns.values(), key=lambda turn: (turn.call.round, turn.call.agent))
    ]
    assert heard == [[], [], [(0, 0), (0, 1)], [(0, 0), (0, 1)], [(1, 0), (1, 2)], [(1, 0), (1, 2)]]
    form = make_format(Path(tokenizer), PromptConfig())
    told = []
    for trajectory in load_selection(tmp_path / "chosen" / "dialogue.parquet").trajectories:
        example = dialogue_example(form, question, turns[trajectory.turn_key], turns, variant="dialogue")
        told.append(form.tokenizer.decode(example.ids[example.weights["completion"] > 0]))
    _, another, better = form.telling
    assert told == [
        # The first agent's own answer comes first; the second said nothing in the second round.
        f"The answer is 3.{another}The answer is 4.{better}So the answer is 5.",
        f"The answer is 3.{another}The answer is 4.{better}Hence the answer is 5.",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"said": "The answer is 5."}, "must be lists of texts"),
        ({"said": [["a"], []]}, "must be lists of texts"),
        ({"said": [["a", 3]]}, "null stands for an agent that said nothing"),
        ({"gold": None}, '"gold"'),
    ],
)
def test_a_row_that_is_no_debate_is_named(tmp_path, tokenizer, capsys, row, message):
    (tmp_path / "debates.jsonl").write_text(json.dumps(ROWS[1]) + "\n" + json.dumps({**ROWS[0], **row}) + "\n")
    assert bring(tmp_path / "debates.jsonl", tmp_path / "out.sqlite", tokenizer) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "debates.jsonl" in error
    assert "line 2" in error


def test_real_transcripts_become_every_variant(tmp_path, tokenizer, capsys):
    path = TRANSCRIPTS / "gpt-4o_multipersona.jsonl.gz"
    if not path.is_file():
        pytest.skip("debate_medmcqa is not here")
    out = tmp_path / "out.sqlite"
    columns = ("--answer", "answer_idx", "--choices", "options.A,options.B,options.C,options.D")
    arguments = ("--model", "gpt-4o", "--tokenizer", tokenizer, "--rounds", "raw_responses", *columns)
    assert run("import", path, out, *arguments) == 0
    assert run("label", out, "--grader", "choice") == 0
    assert run("select", out, "--grader", "choice", "--out", tmp_path / "chosen") == 0
    shown = capsys.readouterr().out
    assert "600 turns" in shown
    variants = [variant for variant in get_args(Variant) if variant != "summary"]
    found = {variant: load_selection(tmp_path / "chosen" / f"{variant}.parquet").trajectories for variant in variants}
    assert all(found.values())
    assert len(found["round1_only"]) > len(found["final_only"])
    with TraceStore(out, read_only=True) as store:
        turns = {turn.key: turn for turn in store.turns()}
        questions = {question.id: question for question in store.questions()}
        labels = store.labels(grader("choice").id)

    # What the debates themselves say, without the machinery: votes, draws and transcripts.
    last: dict[str, list] = {question: [] for question in questions}
    for turn in sorted(turns.values(), key=lambda turn: turn.call.agent):
        if turn.call.round == 1:
            last[turn.call.question_id].append(turn)
    voted, drawn, told = set(), set(), {}
    for spoken in last.values():
        read = [turn for turn in spoken if labels[turn.key].verdict != "unparseable"]
        votes = Counter(labels[turn.key].answer for turn in read).most_common(1)
        voted |= set([turn.key for turn in read if labels[turn.key].answer == votes[0][0]][:2])
        drawn |= set(sorted((turn.key for turn in read), key=lambda key: stable_hash([0, key]))[:2])
        right = [turn for turn in read if labels[turn.key].verdict == "right"]
        before = {turn.key: [turns[key] for key in turn.call.parents] for turn in right}
        own = {key: next(each for each in before[key] if each.call.agent == turns[key].call.agent) for key in before}
        right.sort(key=lambda turn: labels[own[turn.key].key].verdict == "right")
        for turn in right[:2]:
            peers = [each for each in before[turn.key] if each is not own[turn.key]]
            told[turn.key] = [own[turn.key], *peers, turn]
    assert {trajectory.turn_key for trajectory in found["majority"]} == voted
    assert {trajectory.turn_key for trajectory in found["random"]} == drawn
    arguments = ("--grader", "choice", "--out", tmp_path / "drawn", "--variant", "random", "--seed", 1)
    assert run("select", out, *arguments) == 0
    others = load_selection(tmp_path / "drawn" / "random.parquet").trajectories
    assert {trajectory.turn_key for trajectory in others} != drawn
    assert {t.turn_key: t.trace_keys for t in found["dialogue"]} == {
        key: tuple(turn.key for turn in each) for key, each in told.items()
    }
    form = make_format(Path(tokenizer), PromptConfig())
    for key, each in told.items():
        question = questions[turns[key].call.question_id]
        example = dialogue_example(form, question, turns[key], turns, variant="dialogue")
        assert example.retokenised
        text = form.tokenizer.decode(example.ids[example.weights["completion"] > 0])
        _, another, better = form.telling
        texts = [turn.completion.text for turn in each]
        assert text == f"{texts[0]}{another}{texts[1]}{another}{texts[2]}{better}{texts[3]}"
