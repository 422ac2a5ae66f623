"""Known datasets: every row accounted for, right golds from each format, nothing held out in what is learned from."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from agentark_jax.config import parse
from agentark_jax.errors import UsageError
from agentark_jax.pipeline import Pipeline
from agentark_jax.progress import Display
from agentark_jax.stages import Run
from agentark_jax.tasks.config import FieldsConfig, HubConfig, TaskConfig
from agentark_jax.tasks.datasets import DATASETS, UNLABELLED, last_boxed, load
from agentark_jax.tasks.drawn import SHARES, pool_of
from agentark_jax.tasks.grading.final_answer import grade_final_answer
from agentark_jax.tasks.items import Item, make_question
from agentark_jax.tasks.own import parse_own, read_own
from agentark_jax.tasks.rows import read_file
from agentark_jax.tasks.task import SPLITS, make_task
from agentark_jax.traces.store import TraceStore

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"


def real(file):
    if not (DATA / file).is_file():
        pytest.skip(f"{file} of the shared data is not here")
    return DATA / file


def write(path, rows):
    """JSON Lines, as published: nothing escaped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="\n") as file:
        file.write(text)
    return path


def lines_of(path):
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def read(name, path, seed=0):
    return load(name, DATASETS[name].train or DATASETS[name].test, path, seed)


def items(name, *rows, seed=0):
    return [item for row in rows for item in DATASETS[name].parse(row, seed)]


# All of the real files


@pytest.mark.parametrize(
    ("name", "file", "read_rows", "dropped"),
    [
        ("gsm8k", "gsm8k/train.jsonl.gz", 7473, {}),
        ("gsm8k", "gsm8k/test.jsonl", 1319, {}),
        # Two solutions end in an empty box.
        ("math", "math/train.jsonl.gz", 7500, {"duplicates": 1, "unlabelled": 2}),
        ("math", "math/test.jsonl.gz", 5000, {}),
        ("math500", "math500/test.jsonl", 500, {}),
        ("svamp", "svamp/test.jsonl", 1000, {}),
        ("mawps", "mawps/test.jsonl", 2065, {"duplicates": 87, "answered_differently": 1}),
        ("gsm_plus", "gsm_plus/testmini.jsonl.gz", 2400, {"unanswerable": 300}),
        ("medmcqa", "medmcqa/dev.jsonl", 2816, {"ambiguous": 1}),
        ("medmcqa", "medmcqa/validation_hf_fields.jsonl", 2816, {"ambiguous": 1}),
        ("aqua", "aqua/test.jsonl", 254, {"ambiguous": 4}),
        ("mmlu", "mmlu/val.jsonl", 1531, {"duplicates": 2, "ambiguous": 1}),
        ("mmlu", "mmlu/dev.jsonl", 285, {"duplicates": 1}),
        ("mmlu_stem", "mmlu_stem/test.jsonl", 3018, {"duplicates": 12, "ambiguous": 1}),
        ("hotpotqa", "hotpotqa/train_100.jsonl.gz", 100, {}),
        ("hotpotqa", "hotpotqa/dev_distractor_500.jsonl.gz", 500, {}),
        ("hotpotqa", "hotpotqa/validation_hf_100.jsonl.gz", 100, {}),
        ("qasper", "qasper/sample_v03.jsonl", 4, {}),
        ("qasper_leval", "qasper/leval_scientific_qa.jsonl.gz", 184, {"duplicates": 32}),
        ("qmsum", "qmsum/train_first40.jsonl.gz", 252, {"duplicates": 1}),
        ("qmsum", "qmsum/val.jsonl.gz", 272, {"duplicates": 1}),
        ("qmsum", "qmsum/test.jsonl.gz", 281, {"duplicates": 1}),
        ("truthfulqa", "truthfulqa/TruthfulQA.jsonl", 790, {}),
        ("truthfulqa_mc", "truthfulqa/mc_task.jsonl", 790, {}),
    ],
)
def test_every_row_of_the_real_files_is_asked_or_counted(name, file, read_rows, dropped):
    loaded = read(name, real(file))
    assert loaded.counts == {"read": read_rows, **{f"{reason}_dropped": count for reason, count in dropped.items()}}
    assert len(loaded.items) == read_rows - sum(dropped.values())
    for item in loaded.items:
        assert item.rationale.endswith(".")
        assert not item.choices or 0 <= ord(item.answer) - ord("A") < len(item.choices) >= 2
        json.dumps(make_question(name, "debate", item).meta)


@pytest.mark.parametrize("file", ["gsm8k/train.jsonl.gz", "svamp/test.jsonl", "gsm_plus/testmini.jsonl.gz"])
def test_every_real_rationale_with_a_number_is_right(file):
    for item in read(file.split("/")[0], real(file)).items:
        assert grade_final_answer(item.rationale, item.answer).verdict == "right", item
        assert "####" not in item.rationale


def test_the_boxes_of_math_are_math500s_answers():
    boxed = {item.question: item.answer for item in read("math", real("math/test.jsonl.gz")).items}
    asked = read("math500", real("math500/test.jsonl")).items
    different = [item for item in asked if boxed[item.question].replace(" ", "") != item.answer.replace(" ", "")]
    assert len(different) <= 5


def test_medmcqa_is_the_same_in_both_formats():
    files = [real("medmcqa/dev.jsonl"), real("medmcqa/validation_hf_fields.jsonl")]
    first, second = (read("medmcqa", file).items for file in files)
    assert first == second
    right = {row["question"].strip(): row["answer"].strip() for row in map(json.loads, lines_of(files[0]))}
    assert all(item.choices["ABCD".index(item.answer)] == right[item.question] for item in first)


def test_hotpotqa_is_the_same_in_both_formats():
    files = ("dev_distractor_500", "validation_hf_100")
    for name in ("hotpotqa", "hotpotqa_gold"):
        lists, columns = (
            {item.question: replace(item, line=0) for item in read(name, real(f"hotpotqa/{file}.jsonl.gz")).items}
            for file in files
        )
        shared = lists.keys() & columns.keys()
        assert len(shared) == 29
        assert all(lists[question] == columns[question] for question in shared)


# Formats that are not at hand in full, and their traps


def test_gsm8k_line_separators_and_thousands(tmp_path):
    row = {"question": "How\u2028many?", "answer": "He has 1000+234=<<1000+234=1234>>1,234.\n#### 1,234"}
    path = write(tmp_path / "gsm8k" / "train.jsonl.gz", [row])
    (item,) = read("gsm8k", path).items
    assert (item.question, item.answer) == ("How\u2028many?", "1,234")
    assert item.rationale == "He has 1000+234=1,234.\nThe answer is 1,234."
    assert grade_final_answer("The answer is 1234.", item.answer).verdict == "right"


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        (r"So \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"First \boxed{3}, then $\boxed{\text{(}4, 5]}$.", r"\text{(}4, 5]"),
        (r"so $n=\boxed 2$.", "2"),
        (r"Hence \boxed{}.", None),
        (r"Hence \boxed{1", None),
        ("Hence 4.", None),
    ],
)
def test_the_last_box(solution, gold):
    assert last_boxed(solution) == gold


def test_metamathqa_rephrasings_stay_together(tmp_path):
    rows = [
        {
            "query": f"Rephrased {variant}: what is {number} + 1?",
            "response": f"We add. The answer is: {number}?\n#### {number + 1}\nThe answer is: {number + 1}",
            "type": "GSM_Rephrased",
            "original_question": f"What is {number} + 1?",
        }
        for number in range(40)
        for variant in range(5)
    ]
    rows += [{**rows[0], "query": "No answer?", "response": "We add."}]
    path = tmp_path / "MetaMathQA-395K.json"
    path.write_text(json.dumps(rows, indent=1))
    loaded = read("metamathqa", tmp_path)
    assert loaded.counts == {"read": 201, "unlabelled_dropped": 1}
    assert (loaded.items[5].answer, loaded.items[5].rationale[-17:]) == ("2", "The answer is $2$.".strip()[-17:])
    assert "####" not in loaded.items[5].rationale
    splits = {}
    for item in loaded.items:
        splits.setdefault(item.group, set()).add(pool_of(item, tested=False))
    assert all(len(pools) == 1 for pools in splits.values())
    assert {split for pools in splits.values() for split in pools} >= {"held_out", "debate", "warm_start"}


def med(**changes):
    row = {"question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 3, "choice_type": "single"}
    return {**row, "id": "x", "exp": "Because.", "subject_name": "Anatomy", "topic_name": None, **changes}


def test_medmcqa_counts_the_right_choice_from_0_or_from_1(tmp_path):
    hub = [med(question=f"{cop}?", cop=cop) for cop in range(4)]
    own = [med(question=f"{cop}?", cop=cop + 1) for cop in range(4)]
    for file, rows in (("hub", hub), ("own", own)):
        read_items = read("medmcqa", write(tmp_path / f"{file}.json", rows)).items
        assert [item.answer for item in read_items] == list("ABCD")
    assert read_items[0].rationale == "Because.\nThe answer is A."
    assert read_items[0].meta == {"subject_name": "Anatomy"}
    with pytest.raises(UsageError, match=r"cop has neither 0 nor 4"):
        read("medmcqa", write(tmp_path / "some.json", own[1:3]))


def test_medmcqa_rows_without_one_right_choice_are_counted(tmp_path):
    rows = [
        med(cop=0),
        med(question="Hidden?", cop=-1),
        med(question="Several?", choice_type="multi"),
        med(question="Twice?", opa="d"),
    ]
    counts = read("medmcqa", write(tmp_path / "train.jsonl", rows)).counts
    assert counts == {"read": 4, "unlabelled_dropped": 1, "several_right_dropped": 1, "ambiguous_dropped": 1}


HOTPOT = {
    "question": "Who?",
    "answer": "Ann",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": [["B", 0]],
    "context": [["A", ["One.", " Two."]], ["B", ["Ann."]]],
}


def test_hotpotqa_context_and_gold_paragraphs():
    columns = {
        **HOTPOT,
        "supporting_facts": {"title": ["B"], "sent_id": [0]},
        "context": {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Ann."]]},
    }
    assert items("hotpotqa", HOTPOT) == items("hotpotqa", columns)
    assert items("hotpotqa", HOTPOT)[0].context == "A\nOne. Two.\n\nB\nAnn."
    assert items("hotpotqa_gold", columns)[0].context == "B\nAnn."


def qasper(**answers):
    empty = {"unanswerable": False, "extractive_spans": [], "yes_no": None, "free_form_answer": ""}
    asked = [
        {"question": f"{name}?", "answers": [{"answer": {**empty, **each}} for each in given]}
        for name, given in answers.items()
    ]
    sections = [{"section_name": "Method", "paragraphs": ["First.", "Second."]}]
    return {"id": "1", "title": "Title", "abstract": "Abstract.", "full_text": sections, "qas": asked}


def test_qasper_answers_of_every_kind_in_both_formats():
    row = qasper(
        spans=[{"extractive_spans": ["one", "two"]}],
        no=[{"yes_no": False}, {"yes_no": True}],
        free=[{"unanswerable": True}, {"free_form_answer": "three"}, {"free_form_answer": "three"}],
        none=[{"unanswerable": True}],
        empty=[{}],
    )
    columns = {
        **row,
        "full_text": {"section_name": ["Method"], "paragraphs": [["First.", "Second."]]},
        "qas": {
            "question": [each["question"] for each in row["qas"]],
            "answers": [{"answer": [each["answer"] for each in asked["answers"]]} for asked in row["qas"]],
        },
    }
    *found, last = items("qasper", row)
    assert [item.answers for item in found] == [
        ("one, two",),
        ("No", "Yes"),
        ("three", "Unanswerable"),
        ("Unanswerable",),
    ]
    assert [item.answer for item in found] == ["one, two", "No", "three", "Unanswerable"]
    assert found[0].context == "Title\n\nAbstract.\n\nMethod\nFirst.\nSecond."
    assert last == UNLABELLED
    assert items("qasper", columns) == [*found, last]


def test_qmsum_asks_every_query_about_the_whole_meeting():
    row = {
        "meeting_transcripts": [{"speaker": "A", "content": "Hello."}, {"speaker": "B", "content": "Bye."}],
        "general_query_list": [{"query": "Summarize.", "answer": "They met."}],
        "specific_query_list": [{"query": "What did B say?", "answer": "Bye.", "relevant_text_span": [["1", "1"]]}],
    }
    first, second = items("qmsum", row)
    assert first.context == second.context == "A: Hello.\nB: Bye."
    assert (second.answer, second.meta) == ("Bye.", {"type": "specific"})
    other = items("qmsum", {**row, "meeting_transcripts": []})[0]
    assert other.key != first.key
    assert not other.marks & first.marks


def test_the_right_choice_of_truthfulqa_stands_anywhere():
    found = read("truthfulqa_mc", real("truthfulqa/mc_task.jsonl")).items
    first = {
        row["question"]: next(iter(row["mc1_targets"]))
        for row in map(json.loads, lines_of(real("truthfulqa/mc_task.jsonl")))
    }
    assert all(item.choices[ord(item.answer) - ord("A")] == first[item.question] for item in found)
    letters = Counter(item.answer for item in found if len(item.choices) == 4)
    assert all(0.15 < letters[letter] / letters.total() < 0.35 for letter in "ABCD")
    assert read("truthfulqa_mc", real("truthfulqa/mc_task.jsonl")).items == found
    assert read("truthfulqa_mc", real("truthfulqa/mc_task.jsonl"), seed=1).items != found


def test_truthfulqa_is_the_same_in_both_formats():
    file = {
        "Question": "Q?",
        "Best Answer": "b",
        "Correct Answers": "a; b",
        "Incorrect Answers": "c; d ;",
        "Category": "x",
    }
    hub = {"question": "Q?", "best_answer": "b", "correct_answers": ["a", "b"], "incorrect_answers": ["c", "d"]}
    assert items("truthfulqa", file) == items("truthfulqa", {**hub, "category": "x"})
    assert items("truthfulqa", file)[0].answers == ("b", "a")
    mc = {"question": "Q?", "mc1_targets": {"a": 1, "b": 0, "c": 0}}
    hub = {"question": "Q?", "mc1_targets": {"choices": ["a", "b", "c"], "labels": [1, 0, 0]}}
    assert items("truthfulqa_mc", mc) == items("truthfulqa_mc", hub)


def test_choices_of_aqua_and_mmlu():
    (aqua,) = items("aqua", {"question": "Q", "options": ["A)21", "B)B)"], "rationale": "So.", "correct": "B"})
    assert aqua.text == "Q\nA) 21\nB) B)"
    assert aqua.rationale == "So.\nThe answer is B."
    hub = {"question": "Q", "subject": "s", "choices": ["w", "x", "y", "z"], "answer": 2}
    file = {"question": "Q", "subject": "s", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "C"}
    assert items("mmlu", hub) == items("mmlu", file)


def test_equal_questions_with_different_answers(tmp_path):
    rows = [
        {"question": "Q?", "answer": "#### 1"},
        {"question": " q? ", "answer": "#### 2"},
        {"question": "R", "answer": "3"},
    ]
    loaded = read("gsm8k", write(tmp_path / "train.jsonl", rows))
    assert [item.answer for item in loaded.items] == ["3"]
    assert loaded.counts == {"read": 3, "duplicates_dropped": 1, "answered_differently_dropped": 1}
    rows = [{**HOTPOT}, {**HOTPOT, "answer": "Ann Lee"}]
    (item,) = read("hotpotqa", write(tmp_path / "train.jsonl", rows)).items
    assert item.answers == ("Ann", "Ann Lee")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "gsm8k",
            {"problem": "Q", "answer": "1"},
            r"train\.jsonl .*line 1: not as the rows of gsm8k .*no column 'question'",
        ),
        ("gsm8k", {"question": "Q", "answer": "so ####"}, r"line 1: .*an empty question or answer"),
        ("gsm8k", {"question": "\ud800", "answer": "1"}, r"line 1: .*surrogates not allowed"),
        ("mmlu", {"question": "Q", "choices": ["a", "b"], "answer": 2, "subject": "s"}, r"line 1: .*out of range"),
    ],
)
def test_a_row_of_another_kind_is_refused(tmp_path, name, row, message):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=message):
        read(name, path)


# Splits


def sums(count, start=0):
    return [
        {"question": f"What is {number} + 1?", "answer": f"We add.\n#### {number + 1}"}
        for number in range(start, start + count)
    ]


@pytest.fixture
def gsm8k(tmp_path):
    write(tmp_path / "gsm8k" / "train.jsonl.gz", sums(400))
    write(tmp_path / "gsm8k" / "test.jsonl", sums(60, 1000))
    return tmp_path


SIZES = {"held_out": 40, "validation": 8, "debate": 100, "warm_start": 50}


def drawn(path, sizes=SIZES, **options):
    task = make_task(TaskConfig(name="gsm8k", path=str(path), **options), sizes)
    return {split: task.questions(split, sizes.get(split, 0)) for split in SPLITS}, task


def test_splits_share_nothing_and_do_not_move_when_others_grow(gsm8k):
    splits, task = drawn(gsm8k)
    prompts = [question.prompt for questions in splits.values() for question in questions]
    assert len(prompts) == len(set(prompts)) == sum(SIZES.values())
    assert all("What is 10" in question.prompt for question in splits["held_out"])
    assert task.counts == {"read": 400, "held_out_elsewhere_dropped": 0, "held_out_read": 60}
    for grown in SPLITS:
        sizes = {**SIZES, grown: SIZES[grown] + 5}
        more, _ = drawn(gsm8k, sizes)
        assert {split: questions[: SIZES[split]] for split, questions in more.items()} == splits
    again, _ = drawn(gsm8k, seed=1)
    assert again["debate"] != splits["debate"]
    question = splits["debate"][0]
    assert task.grade(question, question.rationale).verdict == "right"
    assert task.grade(question, "The answer is -1.").verdict == "wrong"


def test_one_file_is_cut_so_that_no_seed_learns_what_another_holds_out(gsm8k):
    by_seed = [drawn(gsm8k / "gsm8k" / "train.jsonl.gz", {**SIZES, "debate": 90}, seed=seed)[0] for seed in range(3)]
    held_out = {question.prompt for splits in by_seed for question in splits["held_out"]}
    learned = {q.prompt for splits in by_seed for split in SPLITS if split != "held_out" for q in splits[split]}
    assert len(held_out) > SIZES["held_out"]
    assert not held_out & learned


def test_the_shares_of_the_splits():
    counts = Counter(pool_of(Item(f"Q{number}", "1", ""), tested=False) for number in range(4000))
    assert sum(SHARES.values()) == 1
    assert all(abs(counts[split] / 4000 - share) < 0.03 for split, share in SHARES.items())


def test_what_is_held_out_is_not_learned(gsm8k):
    close = [{"question": "WHAT is  1003 + 1?", "answer": "#### 1004"}]
    write(gsm8k / "gsm8k" / "train.jsonl.gz", sums(400) + close)
    splits, task = drawn(gsm8k, {"debate": 150, "warm_start": 60})
    assert task.counts["held_out_elsewhere_dropped"] == 1
    plus = {"solution": "#### 5", "answer": "5", "seed_answer": "8", "perturbation_type": "x", "question": "Another?"}
    rows = [
        {**plus, "seed_question": "What is 7 + 1?"},
        {**plus, "question": "None?", "answer": "None", "seed_question": ""},
    ]
    write(gsm8k / "gsm_plus" / "testmini.jsonl", rows)
    splits, task = drawn(gsm8k, {"held_out": 1, "debate": 150}, held_out="gsm_plus")
    assert task.counts["held_out_elsewhere_dropped"] == 1
    assert task.counts["held_out_unanswerable_dropped"] == 1
    assert [(q.task, q.answer) for q in splits["held_out"]] == [("gsm_plus", "5")]
    assert task.grade(splits["held_out"][0], "The answer is 5.").verdict == "right"


def test_own_questions_are_measured_by_a_dataset(tmp_path):
    own = [{"question": f"What is {number} + 2?", "answer": number + 2} for number in range(40)]
    write(tmp_path / "mine.jsonl", [*own, {"question": "how MANY  apples?", "answer": 3}])
    problem = {"level": 1, "subject": "Algebra", "solution": "\\boxed{3}", "answer": "3"}
    rows = [{**problem, "problem": "How many apples?"}, {**problem, "problem": "How many pears?"}]
    write(tmp_path / "math500" / "test.jsonl", rows)
    config = TaskConfig(path=str(tmp_path / "mine.jsonl"), held_out="math500", shots=1)
    task = make_task(config, {"held_out": 2, "debate": 29, "warm_start": 10})
    assert task.counts == {
        "read": 41, "duplicates_dropped": 0, "held_out_elsewhere_dropped": 1, "held_out_read": 2
    }  # fmt: skip
    measured = task.questions("held_out", 2)
    assert {question.task for question in measured} == {"math500"}
    assert all(question.prompt.startswith("Examples:") for question in measured)
    assert task.grade(measured[0], "Thus $\\boxed{3}$.").verdict == "right"
    learned = [*task.questions("debate", 29), *task.questions("warm_start", 10)]
    assert len({question.asked for question in learned}) == 39
    assert task.grade(learned[0], f"The answer is {learned[0].answer}.").verdict == "right"
    with pytest.raises(UsageError, match=r"questions\.held_out is 3, but math500 has 2"):
        make_task(config, {"held_out": 3})
    with pytest.raises(UsageError, match=r"held_out goes with questions that are read"):
        TaskConfig(held_out="math500")


@pytest.mark.parametrize("name", [name for name, dataset in DATASETS.items() if dataset.train is None])
def test_test_sets_are_never_learned_from(name, tmp_path):
    instead = DATASETS[name].instead
    assert DATASETS[instead].train is not None
    with pytest.raises(
        UsageError, match=rf"task\.name is {name}, a test set: .*task\.name to {instead} .*task\.held_out"
    ):
        make_task(TaskConfig(name=name, path=str(tmp_path)), {"held_out": 1, "debate": 1})
    with pytest.raises(UsageError, match="never learned from"):
        make_task(TaskConfig(name=name, path=str(tmp_path), shots=1), {"held_out": 1})


def test_a_test_file_is_no_training_file(gsm8k):
    with pytest.raises(UsageError, match=r"test\.jsonl has the name of the test questions of gsm8k"):
        drawn(gsm8k / "gsm8k" / "test.jsonl")
    with pytest.raises(UsageError, match=r"is one file, but gsm8k and svamp are two"):
        drawn(gsm8k / "gsm8k" / "train.jsonl.gz", held_out="svamp")
    with pytest.raises(UsageError, match=r"has no folder svamp"):
        drawn(gsm8k, held_out="svamp")
    (gsm8k / "gsm8k" / "test.jsonl").unlink()
    with pytest.raises(UsageError, match=r"has no file test\*"):
        drawn(gsm8k)
    with pytest.raises(UsageError, match=r"questions\.validation is 90, but gsm8k has \d+ questions for it"):
        drawn(gsm8k / "gsm8k" / "train.jsonl.gz", {"validation": 90})


def test_who_only_measures_needs_no_training_file(gsm8k):
    measured = drawn(gsm8k)[0]["held_out"]
    (gsm8k / "gsm8k" / "train.jsonl.gz").unlink()
    for path in (gsm8k, gsm8k / "gsm8k" / "test.jsonl"):
        splits, task = drawn(path, {"held_out": 40})
        assert splits["held_out"] == measured
        assert task.counts["held_out_read"] == 60
    for sizes, options in ((SIZES, {}), ({"held_out": 40}, {"shots": 2})):
        with pytest.raises(UsageError, match=r"has no file train\*"):
            drawn(gsm8k, sizes, **options)


def test_examples_are_of_the_training_questions_and_of_no_split(gsm8k):
    splits, _ = drawn(gsm8k, shots=2)
    everything = [question for questions in splits.values() for question in questions]
    (shown,) = {question.prompt.removesuffix(question.asked) for question in everything}
    assert shown.count("Question: ") == shown.count("We add.\nThe answer is ") == 2
    assert "What is 10" not in shown
    assert not any(question.asked.split("\n")[0] in shown for question in everything)
    assert drawn(gsm8k, {**SIZES, "warm_start": 70}, shots=2)[0]["debate"] == splits["debate"]
    alone, _ = drawn(gsm8k)
    assert [question.asked for question in alone["debate"]] == [question.asked for question in splits["debate"]]
    assert all(question.asked == question.prompt for question in alone["debate"])
    own = make_task(TaskConfig(path=str(gsm8k / "gsm8k" / "test.jsonl"), shots=3), {"debate": 57})
    assert all(question.prompt.count("Question: ") == 3 for question in own.questions("debate", 57))
    with pytest.raises(UsageError, match=r"need 61 \(debate 58 \+ task\.shots 3\)"):
        make_task(TaskConfig(path=str(gsm8k / "gsm8k" / "test.jsonl"), shots=3), {"debate": 58})


def test_own_questions_to_learn_from_grow_without_moving_the_others(tmp_path):
    path = str(write(tmp_path / "q.jsonl", [{"question": f"{number}?", "answer": number} for number in range(40)]))
    sizes = {"held_out": 5, "validation": 2, "debate": 10, "warm_start": 10}
    before = make_task(TaskConfig(path=path), sizes)
    for grown in ("debate", "warm_start"):
        after = make_task(TaskConfig(path=path), {**sizes, grown: 20})
        assert all(after.questions(split, size) == before.questions(split, size) for split, size in sizes.items())


def test_the_manifest_says_which_questions_were_drawn(gsm8k, tmp_path):
    def counts(name, *arguments):
        options = [f"--questions.{split}={size}" for split, size in SIZES.items()]
        task = ["--task.name=gsm8k", f"--task.path={gsm8k}"]
        config, _ = parse([*options, *task, *arguments, f"--root={tmp_path}", f"--name={name}"], "agentark", "")
        with TraceStore(tmp_path / name / "traces.sqlite") as store:
            run = Run(tmp_path / name)
            manifest, _ = Pipeline(config, 0, run, store, Display(Console(quiet=True))).prepare_questions()
        return manifest.counts

    first, again, more = counts("a"), counts("b"), counts("c", "--questions.debate=101")
    assert first == again
    assert first["read"]["read"] == 400
    assert {split for split in SPLITS if more["hashes"][split] != first["hashes"][split]} == {"debate"}
    rows = [{**row, "answer": row["answer"].replace("We add", "Add")} for row in sums(60, 1000)]
    write(gsm8k / "gsm8k" / "test.jsonl", rows)
    changed = counts("d")["hashes"]
    assert {split for split in SPLITS if changed[split] != first["hashes"][split]} == {"held_out"}


def test_a_context_stands_once_before_the_question():
    item = Item("Who?", "B", "The answer is B.", ("Ann", "Bob"), context="A long text.")
    question = make_question("t", "debate", item, instruction="End so.")
    assert question.prompt == "A long text.\n\nWho?\nA) Ann\nB) Bob\nEnd so."
    assert question.asked == "Who?\nA) Ann\nB) Bob\nEnd so."
    assert question.meta["choices"] == ["Ann", "Bob"]


# A user's own columns


def own(tmp_path, *rows, grader="choice", **fields):
    path = tmp_path / "own.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return [parse_own(row, FieldsConfig(**fields), grader) for row in read_file(path)]


def test_own_columns_by_dotted_path(tmp_path):
    row = {"qa": [{"ask": "Who?"}], "gold": {"text": "Ann"}, "passage": "Text.", "why": "Because."}
    (item,) = own(
        tmp_path, row, grader="short", question="qa.0.ask", answer="gold.text", context="passage", rationale="why"
    )
    assert (item.question, item.answer, item.context) == ("Who?", "Ann", "Text.")
    assert item.rationale == "Because.\nThe answer is Ann."
    assert item.answers == ("Ann",)


@pytest.mark.parametrize(
    ("row", "choices"),
    [
        ({"answer": "B", "options": ["x", "y"]}, ("options",)),
        ({"answer": "y", "options": {"A": "x", "B": "y"}}, ("options",)),
        ({"answer": 1, "opa": "x", "opb": "y"}, ("opa", "opb")),
    ],
)
def test_own_choices(tmp_path, row, choices):
    (item,) = own(tmp_path, {"question": "Which?", **row}, choices=choices)
    assert (item.answer, item.choices) == ("B", ("x", "y"))


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"questoin": "Q", "answer": "1"}, {}, r'own\.parquet .*row 1: no "question".* Did you mean questoin\?'),
        ({"question": "Q", "answer": "1"}, {"context": "passage"}, r'no "passage".*It has: question, answer\.'),
        ({"question": "Q", "answer": "1"}, {"rationale": "why"}, r'no "why"'),
        ({"question": "Q", "answer": "C", "o": ["x", "y"]}, {"choices": ("o",)}, r"'C', which is none of .*A to B"),
        ({"question": "Q", "answer": 2, "o": ["x", "y"]}, {"choices": ("o",)}, r"2, which is none of .*from 0 to 1"),
        ({"question": "Q", "answer": "A", "o": "x"}, {"choices": ("o",)}, r'"o" .*is not a list of texts'),
        ({"question": "Q", "answer": "A", "o": ["x"]}, {"choices": ("o",)}, r"1 choices; give 2 to 26"),
    ],
)
def test_own_columns_that_are_wrong(tmp_path, row, fields, message):
    with pytest.raises(UsageError, match=message):
        own(tmp_path, row, **fields)


def test_own_question_with_two_answers_names_the_rows(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"question": "Q", "answer": "x"}, {"question": "q", "answer": "y"}])
    with pytest.raises(UsageError, match=r"lines 1 and 2: one question with two answers, 'x' and 'y'"):
        read_own(read_file(path), FieldsConfig(), "short")


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('[{"question": "a"}, {"question": "b"}]', 2),
        ('{"question": "a"}\n{"question": "b"}\n', 2),
        ('{\n "x1": {"question": "a"},\n "x2": {"question": "b"}\n}', 2),
        ('{\n "question": "a"\n}', 1),
    ],
)
def test_json_files_of_every_shape(tmp_path, content, lines):
    (tmp_path / "q.json").write_text(content)
    rows = list(read_file(tmp_path / "q.json"))
    assert [row.values["question"] for row in rows] == ["a", "b"][:lines]
    assert [row.values["id"] for row in rows if "id" in row.values] == (["x1", "x2"] if "x1" in content else [])


def test_a_damaged_parquet_file(tmp_path):
    (tmp_path / "q.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match=r"q\.parquet .*no readable Parquet file"):
        list(read_file(tmp_path / "q.parquet"))
    with pytest.raises(UsageError, match="does not exist"):
        list(read_file(tmp_path / "none.parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "gsm8"}, r"task\.name is 'gsm8'; use perhaps: gsm8k"),
        ({"name": "gsm8k", "fields": FieldsConfig("q")}, r"task\.fields is for your own"),
        ({"name": "gsm8k", "grader": "short"}, r"task\.grader is for your own"),
        ({"grader": "numeric"}, r"task\.grader is for your own"),
        ({"path": "x", "grader": "kind"}, r"task\.grader is 'kind'"),
        ({"path": "x", "hub": HubConfig("y")}, r"task\.hub and task\.path"),
        ({"name": "gsm8k", "hub": HubConfig("y")}, r"task\.hub and task\.name"),
        ({"held_out": "svamp"}, r"task\.held_out goes with questions that are read"),
        ({"name": "gsm8k", "held_out": "metamathqa"}, r"task\.held_out is 'metamathqa'"),
        ({"shots": 1}, r"task\.shots is for"),
        ({"name": "gsm8k", "shots": -1}, r"task\.shots is -1"),
    ],
)
def test_settings_that_do_not_go_together(options, message):
    with pytest.raises(UsageError, match=message):
        TaskConfig(**options)


# The hub, or a directory laid out like one of its repositories


@pytest.fixture
def hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "repository").mkdir()
    rows = [{"ask": f"{number}?", "gold": number} for number in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "repository" / "train-00000-of-00001.parquet")
    return str(tmp_path / "repository")


def test_own_questions_from_the_hub(hub):
    config = TaskConfig(hub=HubConfig(hub), fields=FieldsConfig(question="ask", answer="gold"))
    task = make_task(config, {"debate": 6, "held_out": 6})
    found = task.questions("debate", 6) + task.questions("held_out", 6)
    assert {question.prompt for question in found} == {f"{number}?" for number in range(12)}
    assert task.counts == {"read": 12, "duplicates_dropped": 0}
    with pytest.raises(UsageError, match=r"row 1: no \"question\""):
        make_task(replace(config, fields=FieldsConfig()), {"debate": 6})
    with pytest.raises(UsageError, match=r"default, test: cannot be loaded from the hub .*task\.path"):
        make_task(replace(config, hub=HubConfig(hub, split="test")), {"debate": 6})


def test_a_known_dataset_from_the_hub(hub, monkeypatch):
    rows = [{"question": row["question"], "answer": row["answer"]} for row in sums(200)]
    pq.write_table(pa.Table.from_pylist(rows), Path(hub) / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(sums(20, 1000)), Path(hub) / "test-00000-of-00001.parquet")
    monkeypatch.setattr(
        "agentark_jax.tasks.datasets.DATASETS", {"gsm8k": replace(DATASETS["gsm8k"], hub=hub, configs=(None,))}
    )
    task = make_task(TaskConfig(name="gsm8k"), {"debate": 50, "held_out": 20})
    assert task.counts == {"read": 200, "held_out_elsewhere_dropped": 0, "held_out_read": 20}


def test_code_of_a_hub_dataset_never_runs(hub, tmp_path):
    (tmp_path / "coded").mkdir()
    (tmp_path / "coded" / "coded.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UsageError, match="cannot be loaded from the hub"):
        make_task(TaskConfig(hub=HubConfig(str(tmp_path / "coded"))), {"debate": 1})
    assert not (tmp_path / "ran").exists()


def test_a_dataset_without_a_copy_on_the_hub():
    with pytest.raises(UsageError, match=r"qmsum is not on the hub .*Yale-LILY/QMSum.* task\.path"):
        load("qmsum", DATASETS["qmsum"].train, None, 0)


def test_nothing_heavy_is_imported_before_it_is_needed():
    heavy = {"datasets", "pyarrow", "jax"}
    script = f"import sys; from agentark_jax.tasks import task, drawn; print({heavy} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("gsm8k", "gsm8k"),
        ("math", "math"),
        ("medmcqa_dev", "medmcqa"),
        ("mmlu_stem", "mmlu_stem"),
        ("truthfulqa_mc", "truthfulqa"),
        ("hotpotqa", "hotpotqa"),
        ("qmsum", "qmsum"),
        ("qasper_leval", "qasper"),
        ("truthfulqa", "truthfulqa"),
    ],
)
def test_gold_answers_are_right_and_others_are_not(name, folder):
    """From the file through the task's own grader: what students learn from is what it calls right."""
    directory = DATA / folder
    if not directory.is_dir():
        pytest.skip(f"{folder} is not here")
    sizes = {"held_out": 12}
    if DATASETS[name].train is not None:
        # The 40 meetings of QMSum that are here leave none for validation.
        sizes |= {"warm_start": 6, "debate": 12, "validation": 0 if name == "qmsum" else 2}
    task = make_task(TaskConfig(name=name, path=str(directory)), sizes)
    for split, count in sizes.items():
        for question in task.questions(split, count):
            assert task.grade(question, question.rationale).verdict == "right"
            assert task.grade(question, "The answer is zebra42.").verdict != "right"
            assert task.grade(question, question.prompt).verdict != "right"
