"""The grader: what it must read, and a table of traps on which it must never say "right"."""

import time
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentark_jax.tasks.grading.final_answer import grade_final_answer

RIGHT = [
    ("3 + 4 = 7. 7 * 2 = 14. The answer is 14.", "14"),
    ("The answer is 14", "14"),
    ("the answer is 14.\n", "14"),
    ("The answer is: 14.", "14"),
    ("The final answer is 14.", "14"),
    ("The\nanswer is 14.", "14"),
    ("So the answer is 14.", "14"),
    ("7 * 2 = 14, so the answer is 14.", "14"),
    ("Therefore, the answer is 14.", "14"),
    ("**The answer is 14.**", "14"),
    ("The answer is **14**.", "14"),
    ("The answer is $14.", "14"),
    ("The answer is $14$.", "14"),
    ("The answer is \\$14.", "14"),
    ("The answer is 14 dollars.", "$14"),
    ("The answer is 14$.", "14"),
    ("The answer is 14%.", "14"),
    ("The answer is 14\\%.", "14%"),
    ("The answer is 14 percent.", "14%"),
    ("The answer is 14 apples.", "14"),
    ("The answer is 14 red apples.", "14 apples"),
    ("The answer is 1 apple.", "1 apples"),
    ("The answer is 1,234.", "1234"),
    ("The answer is 1234.", "1,234"),
    ("The answer is $1,234,567.50.", "1234567.5"),
    ("The answer is 14.0.", "14"),
    ("The answer is 14.00", "14"),
    ("The answer is 0.5.", "1/2"),
    ("The answer is .5.", "0.50"),
    ("The answer is 3/4.", "0.75"),
    ("The answer is 14/2.", "7"),
    ("The answer is \\frac{3}{4}.", "3/4"),
    ("The answer is -3.", "-3"),
    ("The answer is −3.", "-3"),
    ("The answer is -$3.", "-3"),
    ("The answer is +3.", "3"),
    ("The answer is -0.", "0"),
    ("3 + 4 = 7\n#### 7", "7"),
    ("#### 1,234\n", "1234"),
    ("So we get \\boxed{7}.", "7"),
    ("So $x = \\boxed{7}$.", "7"),
    ("We get \\[\\boxed{\\frac{1}{2}}\\]", "0.5"),
    ("The answer is \\boxed{7}.", "7"),
    ("The answer is $\\boxed{7}$.", "7"),
    ("The answer is 8. The answer is 7.", "7"),
    ("The answer is 8.\n#### 7", "7"),
    ("The answer is " + "9" * 50 + ".", "9" * 50),
    ("The answer is Paris.", "paris"),
    ("The answer is  New   York.", "New York"),
    ("The answer is ﬁve.", "five"),
    ("The answer is (B).", "(B)"),
    ("\\boxed{a + {b}}", "a + {b}"),
    ("The answer is 1e5.", "1E5"),
]

ASKED = "How many red apples are there?"

# What "The answer is ….", with gold 7, may not be followed by; separated by "|".
NOT_SEVEN = [
    r"""8|-7|77|0.7|7.5|70|700|7,000|07.1|7/2|1/7|7/0|0/7|7 or 8|7 and 8|7, 8|7 8|7-8|7 - 8|7 to 8|7–8|7:30|7;8""",
    r"""7 / 8|7k|7K|7m|7x|7e0|7e1|7E2|7^2|7**2|7²|7½|7 1/2|7!|7?|7!!|7..|7...|7…|0x7|0b111|7_0|7 million""",
    r"""7 thousand|7 hundred|7 dozen|7 billion|7 mil|7 grand|7 lakh|7 tenths|7 thirds|7 halves|7 quarters""",
    r"""7 squared|7 cubed|7 factorial|7 and a half|7 point five|7 times two|7 more|7 less|7 fewer|7 or more""",
    r"""7 plus|7 minus|7 at least|7 not|7 maybe|7 probably|7 or so|7 roughly|7 each or|7 apples and three pears""",
    r"""7 apples or eight|7 apples, 3 pears|7 apples + 3|not 7|about 7|at least 7|roughly 7|maybe 7""",
    r"""between 6 and 7|less than 7|more than 7|over 7|~7|≈7|<7|>7|≤7|≠7|±7|n=7|x = 7|= 7|=7|3 + 4|3 + 4 = 7""",
    r"""6 + 1|2 * 4 - 1|7 = 8|8 = 7|7 * 1|seven|VII|７|٧|۷|⑦|七|7,|,7|7,0|7,00|0,007|7,0000|1,7|7.0.0|7.000,0|7'000""",
    r"""7 000|"7|7"|'7'|(7)|[7]|{7}|<7>|7)|(7|--7|+-7|-+7|- 7|+ - 7|$-$7|$$7|7%%|$7%|7°|7 m|7!=8|7 (or 8)""",
    r"""7 (no, 8)|7 [8]|7 ->8|7→8|7, I think, or 8|7. Or 8|7. No, 8|7\n8|7.\n8|7\nor 8|7. Wait|7 wait""",
    r"""__import__("os")|7;import os|int("7")|7 if True else 8|lambda: 7|7j|7L|7f|7n|7a|a7|N/A|?||. 8|unknown""",
    r"""none|7 dollars and 50 cents|7.5 dollars|7 per cent of 50|7 out of ten|7 apples left over|7 of 9|7th|7s""",
    r"""7-ish|7ish|7 ish|7 quadrillion|7 gazillion|7 myriad|7 sixteenths|7 millionths|7 twentieths|7 doubled""",
    r"""7 halved|7 fold|7 teen|7 pairs|7 kilo|7 pi|7 sqrt|7 root|7 log|7 short|7 extra|7 missing|7 nope|7 sorry""",
    r"""7 hmm|7 bad|7 excluding|7 guessing|7 pears|7 apples doubled|7 sour apples|7 dollars short""",
]

# (text, gold): none of these may be called right.
TRAPS = [
    *[(f"The answer is {answer}.", "7") for line in NOT_SEVEN for answer in line.replace("\\n", "\n").split("|")],
    ("", "7"),
    ("7", "7"),
    ("7.", "7"),
    ("3 + 4 = 7.", "7"),
    ("It is 7.", "7"),
    ("Answer: 7", "7"),
    ("answer is 7.", "7"),
    ("The answer = 7", "7"),
    ("The answers is 7.", "7"),
    ("The answer isn't 7.", "7"),
    ("The answer is", "7"),
    ("The answer is 7. The answer is 8.", "7"),
    ("The answer is 7. The answer is", "7"),
    ("The answer is 7. But the answer is 8.", "7"),
    ("The answer is 7. The answer is not 7.", "7"),
    ("I doubt that the answer is 7.", "7"),
    ("It is wrong that the answer is 7.", "7"),
    ("Maybe the answer is 7.", "7"),
    ("If I add, the answer is 7.", "7"),
    ("Ben says the answer is 7.", "7"),
    ('Ben says "The answer is 7."', "7"),
    ("I do not think" + " " * 60 + "so the answer is 7.", "7"),
    ("Breathe answer is 7.", "7"),
    ("The answer is 7.\n\nQuestion: Ben has 3. How many? 3 + 5 = 8. The answer is 8.", "7"),
    ("The answer is 7.\nI hope it is 8.", "7"),
    ("The answer is 7. #### 8", "7"),
    ("The answer is 7\n#### 8", "7"),
    ("#### 7 or 8", "7"),
    ("##### 7", "7"),
    ("### 7", "7"),
    ("It is not #### 7", "7"),
    ("#### 7\n#### 8", "7"),
    ("####", "7"),
    ("\\boxed{8}", "7"),
    ("\\boxed{}", "7"),
    ("\\boxed{7", "7"),
    ("\\boxed{7}{8}", "7"),
    ("\\boxed{7}8", "7"),
    ("\\boxed{7} or 8", "7"),
    ("\\boxed{7}^2", "7"),
    ("\\boxed{7}\\%", "7"),
    ("\\boxed{8} or \\boxed{7}", "7"),
    ("\\boxed{8}, \\boxed{7}", "7"),
    ("\\boxed{7}. No: \\boxed{8}", "7"),
    ("It is not \\boxed{7}.", "7"),
    ("It isn't \\boxed{7}.", "7"),
    ("It is 8 or \\boxed{7}.", "7"),
    ("The answer is 8, not \\boxed{7}.", "7"),
    ("The answer is 8 = \\boxed{7}.", "7"),
    ("I doubt the answer is \\boxed{7}.", "7"),
    ("\\boxed{x = 7}", "7"),
    ("\\boxed{7, 8}", "7"),
    ("\\boxed{\\boxed{8}, 7}", "7"),
    ("boxed{7}", "7"),
    ("\\fbox{7}", "7"),
    ("\\boxed{7}\nThe answer is 8.", "7"),
    ("The answer is 3.5.", "5"),
    ("The answer is 3.5.", "3"),
    ("The answer is 3.5.", "35"),
    ("n=3k. The answer is n=3k.", "3"),
    ("The answer is 1,234.", "1"),
    ("The answer is 1,234.", "234"),
    ("The answer is 1,234.", "1.234"),
    ("The answer is 1.234.", "1234"),
    ("The answer is 12,34.", "1234"),
    ("The answer is 1,2345.", "12345"),
    ("The answer is 0,123.", "123"),
    ("The answer is 1, 234.", "1234"),
    ("The answer is 7%.", "0.07"),
    ("The answer is 0.07.", "7%"),
    ("The answer is 0.5.", "50"),
    ("The answer is 50%.", "1/2"),
    ("The answer is 7 dollars.", "7%"),
    ("The answer is 7 cents.", "$7"),
    ("The answer is €7.", "$7"),
    ("The answer is 7 pears.", "7 apples"),
    ("The answer is 0.3333333333333333.", "1/3"),
    ("The answer is 0.30000000000000004.", "0.3"),
    ("The answer is 9007199254740993.", "9007199254740992"),
    ("The answer is 0.1.", "0.10000000000000000001"),
    ("The answer is 100000.", "1e5"),
    ("The answer is nan.", "7"),
    ("The answer is inf.", "7"),
    ("The answer is Paris or London.", "Paris"),
    ("The answer is not Paris.", "Paris"),
    ("The answer is Paris. The answer is London.", "Paris"),
    ("The answer is Par is.", "Paris"),
    ("The answer is (A) or (B).", "(A)"),
    ("The answer is yes and no.", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "gold"), RIGHT)
def test_reads_what_it_should(text, gold):
    assert grade_final_answer(text, gold, ASKED).verdict == "right"


def test_never_calls_a_trap_right():
    assert len(TRAPS) >= 250
    graded = [(text, gold, grade_final_answer(text, gold, ASKED)) for text, gold in TRAPS]
    assert [item for item in graded if item[2].verdict == "right"] == []
    assert all(grade.answer == "" and grade.detail for *_, grade in graded if grade.verdict == "unparseable")


@pytest.mark.parametrize(
    ("said", "asked", "gold"),
    [
        ("7 berries", "Which berry, and how many?", "7"),
        ("1 box", "How many boxes?", "1"),
        ("7 sour pears", "How many pears?", "7 sour pears"),
        ("7 hours", "How long?", "7"),
        ("7 square inches", "How large?", "7 sq inch"),
    ],
)
def test_units_are_common_ones_or_those_of_the_question(said, asked, gold):
    assert grade_final_answer(f"The answer is {said}.", gold, asked).verdict == "right"
    unknown = said.replace(said.split()[-1], "quadrillions")
    assert grade_final_answer(f"The answer is {unknown}.", gold, asked).verdict == "unparseable"


@pytest.mark.parametrize(
    ("text", "gold", "verdict", "answer"),
    [
        ("The answer is 8.", "7", "wrong", "8"),
        ("The answer is $1,000.50.", "7", "wrong", "2001/2"),
        ("The answer is 7 or 8.", "7", "unparseable", ""),
        ("3 + 4 = 7.", "7", "unparseable", ""),
        ("The answer is seven.", "7", "unparseable", ""),
        ("The answer is London.", "Paris", "wrong", "london"),
        ("The answer is 14.0 apples.", "14", "right", "14"),
    ],
)
def test_verdicts_and_canonical_answers(text, gold, verdict, answer):
    grade = grade_final_answer(text, gold, ASKED)
    assert (grade.verdict, grade.answer) == (verdict, answer)


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
@settings(max_examples=200, deadline=None)
def test_right_exactly_when_the_fractions_are_equal(said, gold):
    assert (grade_final_answer(f"The answer is {said}.", str(gold)).verdict == "right") == (said == gold)


@given(st.integers(-(10**12), 10**12))
@settings(max_examples=200, deadline=None)
def test_every_spelling_of_an_integer(value):
    for spelling in (str(value), f"{value:,}", f"{value}.0", f"{value}/1", f"${value}", f"{value} apples"):
        grade = grade_final_answer(f"So it goes. The answer is {spelling}.", str(value), ASKED)
        assert (grade.verdict, grade.answer) == ("right", str(value))


@given(st.text(max_size=60), st.sampled_from(["The answer is ", "#### ", "\\boxed{", ""]))
@settings(max_examples=200, deadline=None)
def test_any_text_gets_a_verdict(text, marker):
    assert grade_final_answer(marker + text, "7").verdict in ("right", "wrong", "unparseable")
    assert grade_final_answer(marker + text, text).verdict in ("right", "wrong", "unparseable")


@pytest.mark.parametrize("said", ["1e999999999", "10^999999999", "9**9**9**9"])
def test_powers_are_not_worked_out(said):
    assert grade_final_answer(f"The answer is {said}.", "7").verdict == "unparseable"


def seconds(work):
    """Processor time of what `work` does, the best of three."""
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize(
    ("before", "piece", "after"),
    [
        ("", "The answer is ", ""),
        ("The answer is 7", " ", "x"),
        ("The answer is ", "9", ""),
        ("The answer is ", "1,", ""),
        ("the", " ", "answer is 7"),
        ("", "the ", ""),
        ("", "\\boxed{", ""),
        ("\\boxed{", "{", ""),
        ("\\boxed{7}", " $.", "x"),
        ("", "####", ""),
        ("", "####\n", ""),
        ("", " ", "The answer is 7."),
        ("", "\n", ""),
        ("", "(", ")"),
        ("", "İ", "The answer is \\boxed{7}"),
    ],
)
def test_a_text_eight_times_as_long_takes_some_eight_times_as_long(before, piece, after):
    """Quadratic reading takes 64 times as long. What takes no time at all has no ratio."""
    short, long = (before + piece * (length // len(piece)) + after for length in (5_000, 40_000))

    def as_answer(text):
        grade_final_answer(text, "7")

    def as_gold(text):
        grade_final_answer("The answer is 7.", text)

    for grade in (as_answer, as_gold):
        assert seconds(partial(grade, long)) <= 40 * max(seconds(partial(grade, short)), 0.002)
