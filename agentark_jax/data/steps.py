"""The steps of a completion: what a process reward model judges one by one, at the last token of each."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from agentark_jax.data.spans import spans
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.records import Example

_ANSWER_BEGINS = re.compile(r"the (?:final )?answer is|####|\\boxed\{", re.I)
# Read from left to right: cuts, and what is passed over as a whole, with no cut inside. Each alternative looks at any
# character a bounded number of times, whatever the text.
_CUTS = re.compile(
    r"""
    (?P<cut>
        \n(?:[\s*_=-]*\n)?                                         # after line breaks and lines without a word
        | (?:
            (?<!\.)[.!?][*_"'”’)\]]*(?=[ \t]) | \.\$(?=[ \t])      # after a sentence, or the display math that ends it
            | (?<=\.\$\$) | (?<=\.\s\$\$) | (?<=\.\\\]) | (?<=\.\s\\\]) | (?<=\.\s\\end\{align\*\})
          )(?=[ \t]*[*_"'“‘(\[]{0,3}(?:[^\W_a-z]|[$\\]))           # … and before the beginning of another
        | [。！？][”’」』）]*(?![”’」』）]|\s*\n)
        | (?<=[\w$}\]])(?=[ \t]+[*\#]{0,4}[ ]?Step[ ]\d{1,3}:)     # before a "Step 2:" within a line
    )
    | \\[\\$]                                                      # a row break, a dollar sign: they open nothing
    | ```.*?(?:```|\Z)                                             # code
    | \[asy\].*?(?:\[/asy\]|\Z)                                    # a drawing
    | \$\$.*?(?:\$\$|(?=\n[ \t]*\n)|\Z)                            # display math; in this TeX allows no blank line
    | \\\[.*?(?:\\\]|\Z)
    | \\begin\{(?P<environment>\w+\*?)\}.*?(?:\\end\{(?P=environment)\}|\Z)
    | \b(?:[A-Z]|[A-Za-z](?:\.[A-Za-z])+)\.                        # initials, "e.g."
    | \b(?:vs|cf|al|etc|approx|resp|Mr|Mrs|Ms|Dr|Prof|St|Fig|Eq|Sec|Ch|No(?=\.[ ]\d))\.
    | (?:^|(?<=[.!?][ ]))[ \t*\#(]{0,9}(?:(?:Step[ ])?\d{1,3}|[A-Za-z]|[IVXivx]{2,4})[.)](?=\s)    # of an enumeration
    """,
    re.X | re.S | re.M,
)


class Step(NamedTuple):
    """The tokens `start` to `end`, which is the index after the last; `text` is what they say."""

    start: int
    end: int
    text: str


def answer_begins(text: str) -> int | None:
    """Where the answer's phrase begins: the last "The answer is", "####" or "\\boxed{"; None where there is none."""
    return max((found.start() for found in _ANSWER_BEGINS.finditer(text)), default=None)


def cuts(text: str) -> list[int]:
    """Where steps begin in a text, but for the first: ascending, with words before, between and after them.

    Steps end after line breaks; after sentences (full stop, "!" or "?", with the quotes and brackets that close there,
    before a blank and a capital, a digit, "$" or a backslash); and before a "Step 2:" within a line. The blank after a
    sentence is of the next step, as it is of the next token. There is no cut within code fences, display math and LaTeX
    environments, nor after decimals, initials, common abbreviations and the numbers of enumerations. What is opened and
    never closed goes on to the end. From the sentence of the answer's phrase on (`answer_begins`), all is one step, the
    last.

    Up to there, cuts depend on nothing after the three words that follow them. The time is linear in the text.
    """
    answer = answer_begins(text)
    last = len(text.rstrip()) - 1 if answer is None else answer
    first = len(text) - len(text.lstrip())
    found = {match.end() for match in _CUTS.finditer(text) if match["cut"] is not None}
    return sorted(cut for cut in found if first < cut <= last)


def steps(ids: Sequence[int], tokenizer: Tokenizer) -> list[Step]:
    """The steps of a completion, which have each of its tokens once, in order; none is empty.

    A token that a cut goes through belongs to the step in which its first character lies, even if that is a part of
    one, and a token without text (the end token) to that of the token before it. A step that no token begins in is part
    of the one before.
    """
    text, starts, ends = spans(ids, tokenizer)
    number = np.where(ends > starts, np.searchsorted(cuts(text), starts, side="right"), 0)
    begins = np.flatnonzero(np.diff(np.maximum.accumulate(number), prepend=-1))
    characters = pairwise([*starts[begins].tolist(), len(text)])
    tokens = pairwise([*begins.tolist(), len(ids)])
    return [Step(*span, text[slice(*said)]) for span, said in zip(tokens, characters, strict=True)]


def coverage(examples: Sequence[Example]) -> dict[str, int]:
    """What examples with labelled steps can teach, in counts.

    `steps` are `right` from a label of a half on, or `wrong`. `contrasted` are the questions with a step that may be
    right in one answer and one that may be wrong in another: the other questions give the contrastive loss nothing.
    """
    questions: dict[str, list[np.ndarray]] = {}
    for example in examples:
        questions.setdefault(example.question_id, []).append(np.asarray(example.step_labels))
    labels = np.concatenate([np.zeros(0), *(each for answers in questions.values() for each in answers)])
    contrasted = 0
    for answers in questions.values():
        good = np.asarray([np.any(each > 0) for each in answers])
        bad = np.asarray([np.any(each < 1) for each in answers])
        contrasted += bool(np.any(good[:, None] & bad & ~np.eye(len(answers), dtype=bool)))
    return {
        "answers": len(examples),
        "questions": len(questions),
        "contrasted": contrasted,
        "steps": labels.size,
        "right": int((labels >= 0.5).sum()),
        "wrong": int((labels < 0.5).sum()),
    }
