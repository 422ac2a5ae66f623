"""Audits of graders against labels and each other, and how close free answers come."""

import gzip
import json
import re
from dataclasses import replace

import pytest
from test_graders import DATA
from test_judge import QUESTION, TURNS, said
from test_traces_cli import cells, run

from agentark_jax.records import Label, Question
from agentark_jax.tasks.grading import grader, short
from agentark_jax.traces.audit import Agreement, agreement, read_labelled
from agentark_jax.traces.labels import label_store
from agentark_jax.traces.store import TraceStore


def test_agreement_is_cohens():
    first = ["right"] * 25 + ["wrong"] * 25 + ["right", "unparseable"]
    second = ["right"] * 20 + ["wrong"] * 5 + ["right"] * 10 + ["wrong"] * 15 + ["unparseable", "right"]
    found = agreement(first, second)
    assert found == Agreement(20, 5, 10, 15)
    assert (found.n, found.agreed) == (50, 35)
    # By hand: observed 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    assert found.kappa == pytest.approx(0.4)
    assert Agreement(5, 0, 0, 0).kappa is None
    assert Agreement(5, 0, 3, 0).kappa is None


LABELLED = [
    {"question": "3 + 4?", "gold": "7", "text": "The answer is 7.", "right": True},
    {"question": "3 + 4?", "gold": "7", "text": "Seven.", "right": True},
    {"question": "3 + 4?", "gold": "7", "text": "The answer is 8.", "right": False},
    {"question": "3 + 4?", "gold": "7", "text": "A: 7\x1b[2J", "right": False},
    {"question": "3 + 4?", "gold": "7", "text": "The answer is 7.0", "right": False},
]


def write(path, lines, opener=open):
    with opener(path, "wt") as file:
        file.writelines((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return path


@pytest.mark.parametrize("opener", [open, gzip.open])
def test_audit_counts_what_graders_and_labels_make_of_texts(capsys, tmp_path, opener):
    path = write(tmp_path / "labelled.jsonl", LABELLED, opener)
    code, out, _ = run(
        capsys, "audit", "--grader", "numeric", "--grader", "symbolic", "--labelled", path, "--first", "1"
    )
    assert code == 0
    numeric, symbolic, compared = cells(out)
    assert numeric[:4] == ["numeric-2", "2", "1", "2"]
    assert numeric[4].startswith("1/3 = 33.33%")
    assert numeric[5].startswith("1/2 = 50.00%")
    assert symbolic[0] == "symbolic-2"
    assert compared[2:7] == ["3", "2", "0", "0", "1"]
    assert "numeric-2: unparseable no answer phrase; labelled right; gold 7" in out
    assert "more disagreements" in out
    assert "\x1b[2J" not in out


def test_audit_of_gsm8ks_labelled_solutions(capsys):
    path = DATA / "gsm8k" / "example_model_solutions.jsonl.gz"
    if not path.exists():
        pytest.skip(f"needs {path}")
    assert len(read_labelled(path)) == 4 * 1319
    code, out, _ = run(capsys, "audit", "--grader", "numeric", "--labelled", path)
    (row,) = cells(out)
    assert code == 0
    assert row[4].startswith("0/3,275 = 0.00%")
    assert row[5].startswith("0/2,001 = 0.00%")


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([LABELLED[0], "{"], "line 2"),
        ([{**LABELLED[0], "right": "yes"}], "line 1.*right is 'yes'"),
        ([{**LABELLED[0], "text": 7}], "line 1.*text is 7"),
        ([{"question": "?"}], "line 1.*KeyError"),
        (["[]"], "line 1"),
        ([], "is empty"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(capsys, tmp_path, lines, complaint):
    path = write(tmp_path / "labelled.jsonl", lines)
    code, _, err = run(capsys, "audit", "--grader", "numeric", "--labelled", path)
    assert code == 2
    assert str(path) in err.replace("\n", "")
    assert re.search(complaint, " ".join(err.split()))


def test_audit_refuses_what_cannot_be_meant(capsys, tmp_path):
    path = write(tmp_path / "labelled.jsonl", LABELLED)
    for arguments in ([], ["--labelled", path], [tmp_path / "traces.sqlite", "--labelled", path]):
        assert run(capsys, "audit", *arguments)[0] == 2
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_question(QUESTION)
        store.record_many(TURNS)
        store.put_labels([Label(TURNS[0].key, "numeric-2", "right", "7")])
    assert run(capsys, "audit", tmp_path)[0] == 2
    assert run(capsys, "audit", tmp_path, "--grader", "numeric")[0] == 2


def test_audit_says_how_close_free_answers_come(capsys, tmp_path):
    golds = ["the cat sat on the mat", "a dog"]
    question = Question.make("test", "held_out", "Who sat where?", golds[0], answers=golds)
    turns = [said("The answer is the cat.", 0), said("a dog", 1), said("One.\nTwo.", 2), said("the cat", 3)]
    turns = [replace(turn, call=replace(turn.call, question_id=question.id)) for turn in turns]
    turns[3] = replace(turns[3], call=replace(turns[3].call, question_id=QUESTION.id, round=1))
    other = replace(turns[1], call=replace(turns[1].call, question_id=QUESTION.id))
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_questions([question, QUESTION])
        store.record_many([*turns, other])
        label_store(store, grader("short"), grader("short").id)
    code, out, _ = run(capsys, "audit", tmp_path)
    assert code == 0
    first, second = cells(out)
    assert all(name in out for name in short.SCORES)
    # By hand, means over the two questions. Of "cat sat on mat" (SQuAD) and "the cat sat on the mat" (ROUGE) the first
    # turn says "cat" and "the cat"; the second is right, the third has no answer; the other question's gold is "7".
    assert first[:6] == ["debate", "debater", "0", "4", "2", "16.7 [0.0, 100.0]"]
    assert [cell.split()[0] for cell in first[6:10]] == ["23.3", "25.0", "22.2", "25.0"]
    assert second == ["debate", "debater", "1", "1", "1", *["0.0"] * 6]
