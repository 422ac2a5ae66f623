"""Solutions with marked errors: the published files, and what a line's label says of steps of tokens."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from agentark_jax.data.first_errors import (
    OtherText,
    Solution,
    line_labels,
    read_solutions,
    solution_example,
    step_targets,
)
from agentark_jax.data.steps import steps
from agentark_jax.errors import UsageError

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the real data in ../shared/data is not there")

FILES = {
    ("mr_ben", "mr_ben/math.jsonl.gz"): (918, 769),
    ("mr_gsm8k", "mr_gsm8k/wrong_solutions_subset.jsonl"): (590, 590),
    ("prmbench", "prmbench/test.jsonl.gz"): (2848 - 4, 2844),
    ("big_bench_mistake", "big_bench_mistake/multistep_arithmetic.jsonl"): (300, 238),
    ("big_bench_mistake", "big_bench_mistake/logical_deduction.jsonl.gz"): (300, 294),
    ("big_bench_mistake", "big_bench_mistake/tracking_shuffled_objects.jsonl"): (300, 260),
    ("big_bench_mistake", "big_bench_mistake/word_sorting.jsonl.gz"): (300, 266),
    ("big_bench_mistake", "big_bench_mistake/dyck_languages.jsonl.gz"): (986, 650),
    ("prm800k", "prm800k/samples.jsonl"): (6, 3),
    ("math_shepherd", "math_shepherd/samples.jsonl"): (7, 7),
    ("math_aps", "math_aps/samples.jsonl.gz"): (89 + 12 + 41, 0),  # of three questions; one beginning of each is empty
}


@needs_data
@pytest.mark.parametrize(("dataset", "file"), FILES)
def test_published_files_are_read_whole(dataset, file):
    solutions = read_solutions(dataset, DATA / file)
    assert (len(solutions), sum(each.first_error is not None for each in solutions)) == FILES[dataset, file]
    assert all(each.question and each.lines and each.kind for each in solutions)


@needs_data
def test_errors_are_counted_from_the_first_line():
    (math, *_), (grade, *_), (planted, *_), (mistake, *_) = (
        read_solutions(dataset, DATA / file) for dataset, file in list(FILES)[:4]
    )
    assert "it is impossible" not in math.text
    assert (math.first_error, math.lines[0][:16], math.kind) == (0, "Step 1: The curv", "Claude2")
    assert "B: 8" in math.question
    assert grade.lines[grade.first_error].startswith("Step 2: If it takes Wayne")
    assert planted.lines[planted.first_error].startswith("3. Assume a pencil costs 29 cents")
    assert mistake.lines[mistake.first_error].startswith("Let's calculate C =")
    kinds = Counter(each.kind for each in read_solutions("prmbench", DATA / "prmbench/test.jsonl.gz"))
    assert kinds["missing_condition"] == 356 - 3
    assert kinds["confidence"] == 357 - 1


@needs_data
def test_every_published_line_gives_its_label_to_steps_of_tokens(form):
    apart = wrong = 0
    for dataset, file in FILES:
        for solution in read_solutions(dataset, DATA / file)[::5]:
            found = steps(form.response(solution.text), form.tokenizer)
            labels = line_labels(solution, found)
            assert labels.lines.tolist() == sorted(labels.lines)
            if solution.first_error is None:
                assert labels.right.all()
                assert labels.known.all()
                continue
            wrong += 1
            error = int((labels.known & ~labels.right).argmax())
            assert labels.lines[error] == solution.first_error
            assert not labels.right[error:].any()
            assert labels.known[error:].all()
            belonging = labels.lines == solution.first_error
            assert not (belonging & labels.right).any()
            assert labels.right[labels.lines < solution.first_error].all()
            # The line's last letters are said in its last step, and in no step before.
            assert solution.lines[solution.first_error].split()[-1][-5:] in found[error].text
            apart += found[error].text.strip() == solution.lines[solution.first_error].strip()
    assert wrong > 1000
    assert 0.3 < apart / wrong < 1, "most wrong lines, but not all, are one step"


def labels(form, lines, error):
    """A letter a step: right, wrong, unknown; and the lines of the steps."""
    solution = Solution("?", tuple(lines), error, "made")
    found = line_labels(solution, steps(form.response(solution.text), form.tokenizer))
    letters = {(True, True): "r", (False, True): "w", (False, False): "u"}
    return "".join(
        letters[bool(r), bool(k)] for r, k in zip(found.right, found.known, strict=True)
    ), found.lines.tolist()


@pytest.mark.parametrize(
    ("lines", "error", "expected"),
    [
        (["a b.", "c.", "The answer is 4."], None, ("rrr", [0, 1, 2])),
        (["a b.", "c.", "The answer is 4."], 0, ("www", [0, 1, 2])),
        (["a b.", "c.", "The answer is 4."], 1, ("rww", [0, 1, 2])),
        (["a b.", "c.", "The answer is 4."], 2, ("rrw", [0, 1, 2])),
        # A line of several steps.
        (["It is. It was.", "Be 2. And 3. Then 4.", "Yes. No."], 1, ("rruuwww", [0, 0, 1, 1, 1, 2, 2])),
        (["It is. It was.", "Be 2. And 3. Then 4.", "Yes. No."], 0, ("uwwwwww", [0, 0, 1, 1, 1, 2, 2])),
        (["It is. It was.", "Be 2. And 3. Then 4.", "Yes. No."], 2, ("rrrrruw", [0, 0, 1, 1, 1, 2, 2])),
        (["It is. It was.", "Be 2. And 3. Then 4.", "Yes. No."], None, ("r" * 7, [0, 0, 1, 1, 1, 2, 2])),
        # A step of several lines.
        (["a", "The answer is 4.", "So.", "I think."], 2, ("rw", [0, 2])),
        (["a", "The answer is 4.", "So.", "I think."], 0, ("ww", [0, 1])),
        (["a", "So $$x", "= 3", "= 4.$$ It is. And b.", "c"], 3, ("ruuww", [0, 3, 3, 3, 4])),
        (["a", "So $$x", "= 3", "= 4.$$ It is. And b.", "c"], 2, ("rwwww", [0, 2, 3, 3, 4])),
        # Lines without a letter.
        (["a", "", "b"], 1, ("ww", [1, 2])),
        (["a", "So b? Yes", ""], 2, ("rrw", [0, 1, 2])),
        (["", "a", "b"], 1, ("ww", [1, 2])),
    ],
)
def test_a_lines_label_goes_to_its_last_step(form, lines, error, expected):
    assert labels(form, lines, error) == expected


def test_steps_of_another_text_are_refused(form):
    found = steps(form.response("a\nb"), form.tokenizer)
    with pytest.raises(ValueError, match="not the steps of this solution"):
        line_labels(Solution("?", ("a", "c"), 0, "made"), found)


GOOD = {"input": "?", "steps": ["a", "b"], "answer": "4", "target": "5", "mistake_index": 1}


@pytest.mark.parametrize(
    ("dataset", "row", "message"),
    [
        ("big_bench_mistake", {**GOOD, "mistake_index": 2}, r"line 1.*line 3 is marked as wrong, but there are 2"),
        ("big_bench_mistake", {**GOOD, "mistake_index": "one"}, r"line 1.*no row of big_bench_mistake"),
        ("big_bench_mistake", {"input": "?"}, r"line 1.*'answer'.*no row of big_bench_mistake"),
        ("mr_gsm8k", GOOD, r"line 1.*no row of mr_gsm8k"),
        ("processbench", GOOD, r"processbench.*use one of: mr_ben, mr_gsm8k, prmbench, big_bench_mistake"),
    ],
)
def test_other_rows_are_refused_by_name_and_line(tmp_path, dataset, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=message):
        read_solutions(dataset, path)


def published(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


def rated(*ratings, chosen=0, human=None):
    completions = [{"text": f"step rated {rating}", "rating": rating} for rating in ratings]
    return {"completions": completions, "chosen_completion": chosen, "human_completion": human}


@pytest.mark.parametrize(
    ("steps_of_row", "lines", "error"),
    [
        ([rated(1), rated(0), rated(1)], 3, None),
        ([rated(1), rated(-1, 1, chosen=1), rated(1)], 3, None),
        ([rated(1), rated(-1, chosen=None)], 2, 1),
        # People went on by themselves: what the model said there was wrong, and what follows is not its own.
        ([rated(1), rated(-1, -1, chosen=None, human={"text": "better"}), rated(1)], 2, 1),
    ],
)
def test_prm800k_ends_at_the_first_step_rated_wrong(tmp_path, steps_of_row, lines, error):
    row = {"question": {"problem": "how many?"}, "label": {"steps": steps_of_row}}
    (solution,) = read_solutions("prm800k", published(tmp_path, row))
    assert (len(solution.lines), solution.first_error) == (lines, error)


def test_math_shepherds_signs_stand_where_its_tags_are(tmp_path):
    row = {"input": "How many? Step 1: 1 + 1 = 2 ки\nStep 2: + 1 = 4 ки", "task": "GSM8K"}
    row["label"] = "How many? Step 1: 1 + 1 = 2 +\nStep 2: + 1 = 4 -"
    (solution,) = read_solutions("math_shepherd", published(tmp_path, row))
    assert solution == Solution("How many?", ("Step 1: 1 + 1 = 2", "Step 2: + 1 = 4"), 1, "GSM8K", (1.0, 0.0))
    for damaged in ({"label": row["label"].replace("-", "?")}, {"input": row["input"] + " and more"}):
        with pytest.raises(UsageError, match=r"line 1.*this is no row of math_shepherd"):
            read_solutions("math_shepherd", published(tmp_path, {**row, **damaged}))


def test_math_aps_has_beginnings_with_values_at_their_ends(tmp_path, form):
    prefixes = [("How many?", 0.5), ("How many?\n\n 1 + 1 = 2.\n2 + 1 = 4.", 0.25), ("How many?\n\n1 + 1 = 2.\n", 1.0)]
    steps_of_row = [{"solution_prefix": text, "mc_value": value} for text, value in prefixes]
    row = {"question": "How many?", "final_answer": "3", "question_id": 1, "reasoning_steps": steps_of_row}
    begun, right = read_solutions("math_aps", published(tmp_path, row))
    assert begun == Solution("How many?", ("1 + 1 = 2.\n2 + 1 = 4.",), None, "beginning", (0.25,), whole=False)
    assert (right.text, right.values) == ("1 + 1 = 2.", (1.0,))
    example, unknown = solution_example(form, begun)
    # The answer goes on: its last step ends where its last token does, and nothing says that it stops there.
    whole, _ = solution_example(form, replace(begun, whole=True))
    assert whole.ids[:-1].tolist() == example.ids.tolist()
    assert whole.ids[-1] in form.stop_ids
    assert (example.step_labels.tolist(), example.step_ends.tolist(), unknown) == ([0.25], [len(example.ids) - 1], 1)
    for broken in ({"mc_value": 1.5}, {"solution_prefix": "Why? 1"}):
        with pytest.raises(UsageError, match=r"line 1.*this is no row of math_aps"):
            read_solutions("math_aps", published(tmp_path, {**row, "reasoning_steps": [{**steps_of_row[1], **broken}]}))


def test_values_of_lines_go_to_the_steps_that_they_end_in(form):
    lines = ("One and one are 2. Two and two are 4.", "Three is 4. Four is 5.", "Five is 5.", "So 5. The answer is 5.")
    solution = Solution("?", lines, 1, "own", (1.0, 0.25, 0.75, 0.0))
    found = steps(form.response(solution.text), form.tokenizer)
    right, known = step_targets(solution, found)
    assert [step.text.strip() for step in found] == [
        part for line in lines for part in line.replace(". ", ".|").split("|")
    ]
    assert known.tolist() == [True, True, False, True, True, False, True]
    assert right[known].tolist() == [1, 1, 0.25, 0.75, 0]


def test_steps_of_which_nothing_is_known_are_not_learned(form):
    solution = Solution("?", ("One is 1. Two is 2.", "Three is 4. Four is 5.", "The answer is 5."), 1, "own")
    example, unknown = solution_example(form, solution)
    found = steps(form.response(solution.text), form.tokenizer)
    start = len(example.ids) - len(form.response(solution.text))
    ends = [start + step.end - 1 for step in found]
    assert unknown == 1
    assert example.step_ends.tolist() == [*ends[:2], *ends[3:]]
    assert example.step_labels.tolist() == [1, 1, 0, 0]
    assert example.weights == {}


MISTAKE = {"input": "q", "steps": ["a", "b"], "answer": "1", "target": "1", "mistake_index": 1}


@pytest.mark.parametrize(
    ("dataset", "row", "complaint"),
    [
        ("big_bench_mistake", {**MISTAKE, "input": 5}, "question and steps must be texts"),
        ("big_bench_mistake", {**MISTAKE, "steps": ["a", 5]}, "question and steps must be texts"),
        ("big_bench_mistake", {**MISTAKE, "steps": "ab"}, "is no list of steps"),
        ("big_bench_mistake", {**MISTAKE, "steps": {"a": 1}}, "is no list of steps"),
        ("big_bench_mistake", {**MISTAKE, "steps": [], "mistake_index": None}, "a solution without a word"),
        ("big_bench_mistake", {**MISTAKE, "steps": [" "], "mistake_index": 0}, "a solution without a word"),
        ("big_bench_mistake", {**MISTAKE, "input": "q\ud800"}, r"has '\\ud800', which is half of a character"),
        ("big_bench_mistake", {**MISTAKE, "steps": ["a", "\udfff"]}, r"has '\\udfff', which is half of a character"),
        ("big_bench_mistake", {**MISTAKE, "mistake_index": 0.5}, "0.5 is no number of a step"),
        ("big_bench_mistake", {**MISTAKE, "mistake_index": -1}, "line 0 is marked as wrong"),
        (
            "prm800k",
            {"question": {"problem": "q"}, "label": {"steps": [{"completions": [], "chosen_completion": None}]}},
            "IndexError.* this is no row of prm800k",
        ),
        ("prm800k", {"question": {"problem": "q"}, "label": {"steps": [5]}}, "this is no row of prm800k"),
    ],
)
def test_rows_of_another_kind_are_named(tmp_path, dataset, row, complaint):
    with pytest.raises(UsageError, match=f"line 1: .*{complaint}"):
        read_solutions(dataset, published(tmp_path, row))


def test_a_row_without_a_step_is_left_out(tmp_path):
    assert read_solutions("prm800k", published(tmp_path, {"question": {"problem": "q"}, "label": {"steps": []}})) == []


def test_what_the_tokenizer_changes_is_told_and_a_control_token_is_text(form):
    with pytest.raises(OtherText, match="these are not the steps"):
        solution_example(form, Solution("?", ("ae\u0301b", "c"), 0, "made"))
    example, _ = solution_example(form, Solution("?", ("a<eos>b", "c"), 0, "made"))
    assert example.ids.tolist().count(form.tokenizer.eos_id) == 1
