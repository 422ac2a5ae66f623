"""The graders of the package: what they read, what they must never call right, and that nothing holds them up."""

import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import permutations
from pathlib import Path

import adversarial
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grading import seconds

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.records import Question
from agentark_jax.tasks.grading import GRADERS, grader, short
from agentark_jax.tasks.grading.final_answer import number
from agentark_jax.tasks.grading.symbolic import Symbolic
from agentark_jax.tasks.grading.workers import Workers

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def ask(answer, **meta):
    return Question.make("test", "held_out", "How many red apples are there?", answer, **meta)


def rows(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for line in lines]


def last_box(solution):
    start = solution.rfind("\\boxed{") + len("\\boxed{")
    depth, position = 1, start
    while depth and start >= len("\\boxed{"):
        depth += {"{": 1, "}": -1}.get(solution[position], 0)
        position += 1
    return solution[start : position - 1] if start >= len("\\boxed{") else ""


ADVERSARIAL = {
    "numeric": [(text, ask(gold)) for text, gold in adversarial.NUMERIC],
    "symbolic": [(text, ask(gold)) for text, gold in adversarial.SYMBOLIC],
    "choice": [(text, ask(gold, choices=choices)) for text, gold, choices in adversarial.CHOICE],
    "short": [(text, ask(golds[0], answers=golds)) for text, golds in adversarial.SHORT],
}


def test_names_and_ids():
    assert len({grader(name).id for name in GRADERS}) == len(GRADERS)
    for name in GRADERS:
        assert grader(name) is grader(name)
        assert "The answer is" in grader(name).instruction
    with pytest.raises(UsageError, match="numeric, symbolic"):
        grader("numbers")


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_never_right_on_the_adversarial_set(name):
    graded = [(text, question.answer, grader(name)(question, text)) for text, question in ADVERSARIAL[name]]
    assert [item for item in graded if item[2].verdict == "right"] == []
    assert all(grade.detail and not grade.answer for *_, grade in graded if grade.verdict == "unparseable")
    assert all(grade.answer for *_, grade in graded if grade.verdict == "wrong")


def test_the_adversarial_set_is_large():
    assert sum(map(len, ADVERSARIAL.values())) >= 1500
    assert min(map(len, (ADVERSARIAL["numeric"], ADVERSARIAL["symbolic"]))) >= 500


@pytest.mark.parametrize(
    ("said", "gold", "answer"),
    [
        ("The answer is 18.", "18", "18"),
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\nA: 18", "18", "18"),
        ("**Answer:** 18", "18", "18"),
        ("Final answer: $18", "18", "18"),
        ("### Answer\n\n18 dollars", "18", "18"),
        ("The answer is \\boxed{18\\text{ apples}}.", "18", "18"),
        ("The answer is $\\boxed{\\$1{,}234.50}$.", "1234.5", "2469/2"),
        ("The answer is \\(1,\\!234\\).", "1234", "1234"),
        ("The answer is 1\\,234\\,567.", "1,234,567", "1234567"),
        ("The answer is \\dfrac{7}{2}.", "3.5", "7/2"),
        ("The answer is 3\\frac{1}{2}.", "3.5", "7/2"),
        ("The answer is -3 1/2 miles.", "-3.5", "-7/2"),
        ("The answer is 60 miles per hour.", "60", "60"),
        ("The answer is 60 km/h.", "60 km", "60"),
        ("The answer is $18 per day.", "$18", "18"),
        ("The answer is 45^\\circ.", "45°", "45"),
        ("The answer is 12\\%.", "12%", "12"),
        ("The answer is 12 per cent.", "12%", "12"),
        ("The answer is −7.", "-7", "-7"),
    ],
)
def test_numeric_reads_ordinary_answers(said, gold, answer):
    grade = grader("numeric")(ask(gold), said)
    assert (grade.verdict, grade.answer) == ("right", answer)


@given(st.fractions(max_denominator=50), st.fractions(max_denominator=50))
@settings(max_examples=100, deadline=None)
def test_numeric_is_right_exactly_when_values_are_equal(said, gold):
    whole, rest = divmod(abs(said.numerator), said.denominator)
    sign = "-" if said < 0 else ""
    spellings = [f"\\frac{{{abs(said.numerator)}}}{{{said.denominator}}}", f"{abs(said.numerator)}/{said.denominator}"]
    if whole and rest:
        spellings += [f"{whole} {rest}/{said.denominator}", f"{whole}\\frac{{{rest}}}{{{said.denominator}}}"]
    for spelling in spellings:
        found = number(sign + spelling)
        assert found is not None
        assert found.value == said
        grade = grader("numeric")(ask(str(gold)), f"The answer is {sign}{spelling}.")
        assert (grade.verdict, grade.answer) == ("right" if said == gold else "wrong", str(said))


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"),
        ("(x+1)^2", "x^2+2x+1"),
        ("\\sqrt{4}", "2"),
        ("2 \\times 10^3", "2000"),
        ("x = 5", "5"),
        ("5", "x=5"),
        ("2x+1", "y = 2x+1"),
        ("\\left(3, \\frac{\\pi}{2}\\right)", "(3,\\pi/2)"),
        ("\\{2,1\\}", "\\{1,2\\}"),
        ("2,1", "1, 2"),
        ("(-\\infty,2)\\cup(3,\\infty)", "(-\\infty,2) \\cup (3,\\infty)"),
        ("50", "50\\%"),
        ("10{,}080", "10,\\!080"),
        ("90", "90^\\circ"),
        ("\\frac12", "0.5"),
        ("8\\frac{3}{4}", "\\frac{35}{4}"),
        ("Evelyn", "\\text{Evelyn}"),
        ("(A)", "\\text{A}"),
        ("11_2", "11_{2}"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ("2^{100}", "1267650600228229401496703205376"),
    ],
)
def test_symbolic_compares_by_value(said, gold):
    for text in (f"We get $\\boxed{{{said}}}$.", f"The answer is ${said}$."):
        assert grader("symbolic")(ask(gold), text).verdict == "right"


def test_symbolic_answers_have_one_spelling_that_does_not_depend_on_the_gold_answer():
    alike = ["\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", "\\sqrt{\\frac{1}{2}}", "0.5\\sqrt{2}"]
    for gold in ("\\frac{\\sqrt{2}}{2}", "\\sqrt{3}", "7"):
        grades = [grader("symbolic")(ask(gold), f"\\boxed{{{said}}}") for said in alike]
        assert {grade.answer for grade in grades} == {"sqrt(2)/2"}
    half = {grader("symbolic")(ask("x"), f"\\boxed{{{said}}}").answer for said in ("0.5", "\\frac12", "1/2", "2^{-1}")}
    assert half == {"1/2"}


HOSTILE = [
    "9^{9^{9^9}}",
    "(x+1)^{100000}",
    "__import__('os').system('true')",
    "\\text{" + "a" * 900 + "}",
    "x\\\n[1, 2, 3]\n",
]
MORE_HOSTILE = [
    "9**9**9**9",
    "2^{100000000000}x",
    "(" * 450 + "x" + ")" * 450,
    "{" * 450 + "x" + "}" * 450,
    "\\sqrt{" * 100 + "x" + "}" * 100,
    "\\frac{1}{" * 80 + "x" + "}" * 80,
    "\\int_0^{10^9} x^{x^{x}} dx",
    "\\prod_{n}^{10^{9}} n x",
    "x" + "!" * 60,
    "x" + "9" * 900,
]


@pytest.mark.parametrize(
    "formulas", [HOSTILE, pytest.param(MORE_HOSTILE, marks=pytest.mark.slow)], ids=["some", "more"]
)
def test_hostile_formulas_are_killed_in_time(formulas):
    judge = Symbolic()
    judge._workers.seconds = 0.5
    assert judge(ask("x+1"), "\\boxed{9^{9^{9^9}} + x}").detail == "not decided within 0.5 s"
    for said in formulas:
        start = time.perf_counter()
        grade = judge(ask("x+1"), f"\\boxed{{{said}}}")
        # The limit and the start of a new worker; a machine under load may take longer for that, not for ever.
        assert time.perf_counter() - start < 20
        assert grade.verdict != "right", said
        assert grade.detail or grade.answer, said
    judge._workers.seconds = 20.0
    assert judge(ask("x+1"), "\\boxed{1+x}").verdict == "right"
    judge._workers.close()


def test_a_megabyte_is_not_given_to_a_worker():
    judge = Symbolic()
    for text in ("\\boxed{" + "x+" * 500_000 + "1}", "The answer is $" + "x" * 1_000_000 + "$."):
        assert judge(ask("x+1"), text).verdict == "unparseable"
    assert judge._workers._idle == []


def test_a_worker_that_dies_is_replaced_and_none_is_left():
    workers = Workers(seconds=2.0)
    assert workers.compare("x", "y")["equal"] is False
    (worker,) = workers._idle
    os.killpg(worker.pid, signal.SIGKILL)
    assert "problem" in workers.compare("x", "z")
    assert workers.compare("x+1", "1+x")["equal"] is True
    (second,) = workers._idle
    assert second.pid != worker.pid
    workers.close()
    assert second.returncode is not None
    assert workers._idle == []


def test_a_worker_stops_itself_even_when_nobody_waits_for_it():
    script = (
        "import os, signal\n"
        "from agentark_jax.tasks.grading.workers import Workers\n"
        "workers = Workers(2.0)\n"
        "workers.compare('x', 'y')\n"
        "print(workers._idle[0].pid, flush=True)\n"
        "worker = workers._idle[0]\n"
        'worker.stdin.write(\'["x", "9^{9^{9^{9}}}", 2.0]\\n\')\n'
        "worker.stdin.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    ended = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert ended.returncode == -signal.SIGKILL
    pid = int(ended.stdout)
    for _ in range(600):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{pid}/stat").exists() and " Z " in Path(f"/proc/{pid}/stat").read_text():
            break  # ended; nobody in a container may be there to bury it
        time.sleep(0.05)
    else:
        pytest.fail("the worker is still there")


def test_the_next_formula_does_not_wait_for_a_new_process():
    workers = Workers(seconds=0.5)
    workers.compare("x", "y")
    (worker,) = workers._idle
    start = time.process_time()
    for power in range(3):
        assert workers.compare("x", f"9^{{9^{{9^{{9+{power}}}}}}}")["problem"] == "not decided within 0.5 s"
    assert workers.compare("x+1", "1+x")["equal"] is True
    assert workers._idle == [worker], "it was never started again"
    assert time.process_time() - start < 1
    workers.close()


def test_threads_and_event_loops_may_grade_at_once():
    async def all_at_once():
        texts = [f"\\boxed{{x+{number}}}" for number in range(24)]
        return await asyncio.gather(*(asyncio.to_thread(grader("symbolic"), ask("7+x"), text) for text in texts))

    verdicts = [grade.verdict for grade in asyncio.run(all_at_once())]
    assert verdicts == ["right" if number == 7 else "wrong" for number in range(24)]


def test_a_worker_that_cannot_start_is_an_error(monkeypatch, tmp_path, capfd):
    broken = tmp_path / "algebra.py"
    broken.write_text("import a_library_that_is_not_there\n")
    monkeypatch.setattr("agentark_jax.tasks.grading.workers._SCRIPT", broken)
    with pytest.raises(AgentArkError, match=r"ended at its start with code 1.*math-verify"):
        Workers(1.0).compare("x", "y")
    assert "a_library_that_is_not_there" in capfd.readouterr().err


CHOICES = ("a dog", "the cat", "a dog and a cat", "I do not know")


@pytest.mark.parametrize(
    "text",
    [
        "The answer is (B)",
        "The answer is B.",
        "the answer is (b).",
        "The answer is \\boxed{\\text{B}}.",
        "\\boxed{B}",
        "\\boxed{b}",
        "\\boxed{(B)}",
        "**B**",
        "B",
        "Answer: B",
        "**Answer: B**",
        "### Answer\n\n(B) the cat",
        "#### B",
        "The correct option is (B).",
        "The answer is B. the cat",
        "The answer is (B) The cat.",
        "The answer is the cat.",
        "The answer is: **the cat**",
        "the cat",
        "The answer is B because cats purr.",
        "A dog barks, so it is not A. The answer is B.",
        "The answer is B.\n\nThe answer is (B).",
    ],
)
def test_choice_reads_letters_and_words(text):
    grade = grader("choice")(ask("B", choices=CHOICES), text)
    assert (grade.verdict, grade.answer) == ("right", "B")


def test_choice_takes_no_letter_from_a_text_that_states_a_thousand():
    question = ask("B", choices=CHOICES)
    assert grader("choice")(question, "Answer: B\n" * 1000).verdict == "right"
    for piece in ("Answer: B\n", "\\boxed{B} ", "#### B\n"):
        text = piece * (1_000_000 // len(piece))
        assert grader("choice")(question, text).verdict == "unparseable"
        assert seconds(lambda text=text: grader("choice")(question, text)) < 2


def test_choice_needs_choices_and_a_letter_among_them():
    for question in (ask("B"), ask("B", choices=1), ask("E", choices=CHOICES), ask("the cat", choices=CHOICES)):
        with pytest.raises(AgentArkError, match="choices"):
            grader("choice")(question, "B")
    assert grader("choice")(ask("J", choices=10), "The answer is J.").verdict == "right"
    assert grader("choice")(ask("B", choices=3), "The answer is D.").verdict == "unparseable"
    same = grader("choice")(ask("B", choices=("a cat", "the cat", "the cat")), "The answer is the cat.")
    assert same.verdict == "unparseable"


@pytest.mark.parametrize(
    ("text", "golds", "verdict", "answer"),
    [
        ("The answer is Paris.", ("Paris",), "right", "paris"),
        ("Paris", ("London", "the Paris"), "right", "paris"),
        ("The answer is The  U.S.", ("us",), "right", "us"),
        ("Yes, they were.", ("yes",), "right", "yes"),
        ("Answer: No.", ("no",), "right", "no"),
        ("The answer is no", ("yes",), "wrong", "no"),
        ("It cannot be answered.", ("unanswerable",), "right", "unanswerable"),
        ("Unanswerable", ("unanswerable",), "right", "unanswerable"),
        ("1998-99", ("1998-99",), "right", "1998‐99"),
        ("12 percent", ("12%",), "right", "12 percent"),
        ("1,000 people", ("1000 people",), "right", "1000 people"),
        ("C++", ("c++",), "right", "c⊕⊕"),
        ("The answer is −1.5 °C.", ("-1.5°C",), "wrong", "−1·5 °c"),
        ("The answer is -1.5.", ("−1.5",), "right", "−1·5"),
        ("The answer is", ("x",), "unparseable", ""),
        ("the", ("x",), "unparseable", ""),
        ("One line.\nAnother line.", ("x",), "unparseable", ""),
        # Where a gold is prose, rules call nothing wrong, and nothing has votes.
        (adversarial.PROSE, (adversarial.PROSE,), "right", ""),
        (f"Let me see.\n\nThe answer is {adversarial.PROSE.upper()}", (adversarial.PROSE,), "right", ""),
        (adversarial.PROSE.replace(", since", ".\nSince"), (adversarial.PROSE,), "right", ""),
        (adversarial.PROSE.replace(" team", "\n team"), ("Ann", adversarial.PROSE), "right", ""),
        ("The answer is Ann.", ("Ann", adversarial.PROSE), "right", ""),
        ("The answer is Bob.", ("Ann", adversarial.PROSE), "unparseable", ""),
        ("It was so. " * 30, (adversarial.PROSE,), "unparseable", ""),
        (adversarial.PROSE + " " * 5000, (adversarial.PROSE,), "right", ""),
        ("so " * 5000, ("so " * 5000,), "unparseable", ""),
        # Ten words are no prose.
        (
            "one two three four five six seven eight nine eleven",
            ("one two three four five six seven eight nine ten",),
            "wrong",
            "one two three four five six seven eight nine eleven",
        ),
    ],
)
def test_short_answers(text, golds, verdict, answer):
    grade = grader("short")(ask(golds[0], answers=golds), text)
    assert (grade.verdict, grade.answer) == (verdict, answer)


def test_scores_of_short_answers():
    golds = ["the cat sat on the mat", "a dog"]
    assert short.exact_match("The cat sat on a mat!", golds) == 1.0
    assert short.exact_match("cat", golds) == 0.0
    assert short.token_f1("cat sat", golds) == pytest.approx(2 * 2 / (2 + 4))
    assert short.token_f1("", golds) == 0.0
    assert short.token_f1("the", ["a"]) == 1.0
    scores = short.rouge("the cat", ["the cat sat on the mat"])
    assert scores["ROUGE-1"] == scores["ROUGE-L"] == pytest.approx(2 * 2 / (2 + 6))
    assert scores["ROUGE-2"] == pytest.approx(2 * 1 / (1 + 5))
    assert short.rouge("dog", ["cats", "dogs"])["ROUGE-1"] == 1.0
    assert short.bleu("the cat sat on the mat", golds) == pytest.approx(1.0)
    assert 0 < short.bleu("the cat sat on a mat", golds) < 1
    assert short.bleu("xyz", golds) == 0.0
    question = ask(golds[0], answers=golds)
    assert short.scores(question, "So:\nThe answer is a dog.") == pytest.approx(dict.fromkeys(short.SCORES, 1.0))
    assert short.scores(question, "So:\na dog") == dict.fromkeys(short.SCORES, 0.0)
    assert tuple(short.scores(question, "dog")) == short.SCORES
    prose = ask(adversarial.PROSE)
    assert min(short.scores(prose, adversarial.PROSE).values()) > 0.95, "all but the period"
    assert 0.9 < short.scores(prose, adversarial.PROSE.replace("not ", ""))["ROUGE-L"] < 1


def test_prose_of_other_questions_about_the_same_meeting_is_not_right():
    """QMSum: their scores reach those of right answers, so scores decide nothing (README has the figures)."""
    closest, pairs = 0.0, 0
    for name in ("qmsum/test.jsonl.gz", "qmsum/val.jsonl.gz", "qmsum/train_first40.jsonl.gz"):
        for meeting in rows(name):
            asked = [*meeting["general_query_list"], *meeting["specific_query_list"]]
            golds = [each["answer"].strip() for each in asked]
            for gold in golds:
                assert grader("short")(ask(gold), f"The answer is {gold}").verdict == "right"
            for said, gold in permutations(golds, 2):
                same = short.squad_normalised(said) == short.squad_normalised(gold)
                assert (grader("short")(ask(gold), said).verdict == "right") == same
                closest, pairs = max(closest, 0 if same else short.token_f1(said, [gold])), pairs + 1
    assert pairs > 5000
    assert closest > 0.9


def test_scores_do_not_tell_right_answers_from_wrong_ones():
    """TruthfulQA: right answers against the other right ones, wrong ones against all, in more than five words."""
    right, wrong = [], []
    for row in rows("truthfulqa/TruthfulQA.jsonl"):
        golds, others = (
            list(dict.fromkeys(filter(None, map(str.strip, row[f"{kind} Answers"].split(";")))))
            for kind in ("Correct", "Incorrect")
        )
        right += [(gold, [each for each in golds if each != gold]) for gold in golds if len(golds) > 1]
        wrong += [(other, golds) for other in others]
    for score in (short.token_f1, lambda said, golds: short.rouge(said, golds)["ROUGE-L"]):
        likely, unlikely = (
            np.median([score(said, golds) for said, golds in pairs if len(said.split()) > 5])
            for pairs in (right, wrong)
        )
        assert likely <= unlikely


MEGABYTE_PIECES = [
    "The answer is ",
    "the answer is 7\n",
    "A: 7\n",
    "#### 7\n",
    "### Answer\n",
    "\\boxed{7} ",
    "\\boxed{",
    "\\boxed{{}",
    "\\text{",
    "{(",
    "the final ",
    "1,",
    "9",
    " ",
    "\n",
    "**",
    "B ",
    "(B) or ",
    "because ",
    "$ ",
    "= ",
    "1-",
    "1 /",
    "C++ ",
]


@pytest.mark.parametrize("name", ["numeric", "symbolic", "choice", "short", "prose"])
def test_reading_takes_linear_time(name):
    judge = grader("short" if name == "prose" else name)
    question = ask({"choice": "B", "prose": adversarial.PROSE}.get(name, "7"), choices=4)

    def taken(piece, length):
        text = piece * (length // len(piece)) + "x"
        return seconds(lambda: judge(question, text))

    for piece in MEGABYTE_PIECES:
        # Eight times the text may take eight times as long, here forty; quadratic reading takes sixty-four. What takes
        # no time at all has no ratio.
        assert taken(piece, 200_000) <= 40 * max(taken(piece, 25_000), 0.002), piece


def assert_few_are_missed(name, graded, allowed=0.01):
    counts = Counter(grade.verdict for grade in graded)
    missed = 1 - counts["right"] / len(graded)
    assert missed <= allowed, (name, counts)


def test_gsm8k_gold_solutions_are_right():
    for name in ("gsm8k/train.jsonl.gz", "gsm8k/test.jsonl"):
        solutions = [row["answer"] for row in rows(name)]
        graded = [grader("numeric")(ask(solution.rpartition("####")[2].strip()), solution) for solution in solutions]
        assert {grade.verdict for grade in graded} == {"right"}


def test_gsm8k_answers_of_other_questions_are_wrong():
    solutions = [row["answer"] for row in rows("gsm8k/test.jsonl")]
    golds = [solution.rpartition("####")[2].strip() for solution in solutions]
    for solution, said, other in zip(solutions, golds, golds[1:] + golds[:1], strict=True):
        assert (grader("numeric")(ask(other), solution).verdict == "right") == (said == other)


def test_math500_gold_solutions_are_right():
    graded = [grader("symbolic")(ask(row["answer"]), row["solution"]) for row in rows("math500/test.jsonl")]
    assert_few_are_missed("math500", graded)
    assert not any(grade.verdict == "wrong" for grade in graded)


def test_math500_answers_of_other_questions_are_wrong():
    golds = [row["answer"] for row in rows("math500/test.jsonl")]
    for said, other in zip(golds, golds[1:] + golds[:1], strict=True):
        grade = grader("symbolic")(ask(other), f"The answer is ${said}$.")
        assert grade.verdict != "right" or said == other.removeprefix("x="), (said, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["math/train.jsonl.gz", "math/test.jsonl.gz"])
def test_math_gold_solutions_are_right(name):
    solutions = [(row["solution"], last_box(row["solution"])) for row in rows(name)]
    graded = [grader("symbolic")(ask(gold), solution) for solution, gold in solutions if gold]
    assert len(graded) > 4900
    assert_few_are_missed(name, graded)


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4o-mini"])
def test_debate_transcripts_are_never_read_as_another_letter(model):
    """`rounds_answers` are the letters that the debate's authors read, with a looser reader."""
    read = Counter()
    for row in rows(f"debate_medmcqa/{model}_multipersona.jsonl.gz"):
        question = ask(row["answer_idx"], choices=tuple(row["options"].values()))
        for texts, letters in zip(row["raw_responses"], row["rounds_answers"], strict=True):
            for text, letter in zip(texts, letters, strict=True):
                said = grader("choice")(question, text).answer
                read["same" if said == letter else "none" if not said else "another"] += 1
    assert read["another"] == 0
    assert read["same"] > 330


FORMS = [
    ("### Final Answer:\n(C) bile", "C"),
    ("#### Why the others fail\nThey do.\n\n### Updated Answer:\n(B) lymph.", "B"),
    ("### Answer\n\nThe best match is:\n\n**(B) lymph**\n\nThis fits what was found.", "B"),
    ("### Answer\n\nIt has to do with fats.\n\n**Answer: (C) bile**", "C"),
    ("The answer is (C) bile\n\n**Reasoning**: fats.", "C"),
    # A second letter, a doubt, or words of another choice: nothing that could be read two ways is read.
    ("### Answer\n\nIt could be (A) blood.\n\n(B) lymph\n\n(C) bile", ""),
    ("### Answer\n\nIt is not:\n\n(B) lymph", ""),
    ("### Answer\n\nThe best match is:\n\n(B) bile", ""),
    ("#### A\nThe answer is (B) lymph.", ""),
    ("#### A. blood\nNo.\n#### B. lymph\nYes.", ""),
]


@pytest.mark.parametrize(("text", "letter"), FORMS)
def test_headings_lead_to_an_answer_or_are_none(text, letter):
    question = ask("B", choices=("blood", "lymph", "bile", "pus"))
    assert grader("choice")(question, text).answer == letter
