r"""Answers in LaTeX, as in MATH, compared by value.

Two plain numbers are compared as fractions and words as text, here; all else goes to a worker process.
"""

import re
from functools import lru_cache

from agentark_jax.records import Grade, Question
from agentark_jax.tasks.grading.final_answer import NOT_UNITS, Number, are_units, normalised, number, unit_names
from agentark_jax.tasks.grading.reading import (
    ANSWER_PHRASE,
    BOXED,
    HEADED,
    PART_OF_FORMULA,
    Reader,
    Unreadable,
    trimmed,
)
from agentark_jax.tasks.grading.workers import Workers

# An answer takes two seconds at most.
SECONDS = 1.2
MAX_LENGTH = 1000

# Not the only box of its sentence, or, just before it: a denial, another candidate, the rest of a larger formula.
_DOUBT = re.compile(
    r"\\boxed\{|\b(?:doubt|deny|unlikely|guess)"
    r"|(?:\b(?:not|never|cannot|isn't|aren't|wrong|incorrect|false|maybe|perhaps|possibly|either)\b[\s$(\\]{0,4}"
    r"(?:(?:be|equals?|equal to)\b[\s$(\\]{0,4})?|[0-9}$] ?or\b[\s$(\\]{0,4}|\\text ?\{ ?or ?\} ?)\Z|"
    + PART_OF_FORMULA,
    re.I,
)
_TAKEN_BACK = (
    "wait|hmm|oops|sorry|actually(?=,)|wrong|incorrect|mistake|correction|re-?check|i mean|let me|should be"
    "|scratch that|on second thoughts?|my answer|nope|hold on|not quite|on reflection|i meant|never mind"
)
_SCALES = "[a-z]{1,12}illions?|thousands?|hundreds?|dozens?"
# After a box: pieces of what closes its formula, or of a unit; then words that do not take it back.
_CLOSING = re.compile(
    r"[\s.,;:)$*}~]|\\[\]),;:! %\\]|\\end\{[a-z*]{1,20}\}|\\q?quad|\^ ?\{? ?\\circ ?\}?"
    rf"|\\(?:text|mbox|textrm|mathrm) ?\{{(?! ?(?:or|and|{_SCALES}))[^{{}}]{{0,60}}\}}(?:\^\{{?[23]\}}?)?",
    re.I,
)
_WORDS_AFTER = re.compile(
    r"(?!or\b|no\b[,.:!]|(?:and|to|plus|minus|times|but)\b[\s$\\(]{0,4}(?:boxed|[0-9-])"
    rf"|(?:{_SCALES}|k)\b)"
    r"(?:(?=(?<=[\s.,;:)$*}\]%!])[A-Za-z]|[(\[$]"
    r"|\\(?!(?:cdot|times|div|pm|mp|[dt]?frac|sqrt|pi|text|mbox|mathrm|cup|cap)(?![A-Za-z])))"
    rf"(?:(?!\b(?:{_TAKEN_BACK})\b)[\s\S])*)?",
    re.I,
)


def _may_follow(after: str) -> bool:
    """Whether a box stands for its text's answer with this after it.

    Pieces are taken one by one and never given back. (A possessive pattern would say that, but Python before 3.11.5
    matches some of them wrongly.)
    """
    position = 0
    while piece := _CLOSING.match(after, position):
        position = piece.end()
    return _WORDS_AFTER.fullmatch(after, position) is not None


_BOXES = Reader(HEADED.phrase, _DOUBT, _may_follow, MAX_LENGTH)
_DRAWING = "[asy]"

_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|operatorname) ?\{([^{}\\]*)\}")
_UNIT = re.compile(r"(?<=[0-9}]) ?\\(?:text|mbox|textrm|mathrm) ?\{[^{}]*\}(?: ?\^ ?\{?[23]\}?)?\Z")
_MARKS = {"\\circ": "degree", "\\degree": "degree", "%": "percent", "\\$": "dollar"}
_ANY_UNIT = {name + power for name in ("unit", "square", "cubic", "sq", "cu") for power in ("", "^2", "^3")}
# What letters name here is no product: the angle ABC is not the angle ACB.
_FIGURE = re.compile(r"\\(?:[dm]?angle|measuredangle|triangle|over(?:line|(?:left)?rightarrow)|widehat) ?\{? ?[A-Z]{2}")
_SET, _PAIR = re.compile(r"\\\{.*\\\}", re.S), re.compile(r"[(\[].*,.*[)\]]", re.S)
_NUMERAL = re.compile(r"(-?[0-9A-Z]+)_ ?\{?([0-9]+)\}?")
# "x =", "f(x) =", "a_1 =" before a value.
_NAMED = re.compile(r"\A\s*[A-Za-z](?:_\{?[A-Za-z0-9]\}?)?(?:\([A-Za-z]\))?\s*=(?!=)")
_WORD = re.compile(r"[a-z]+")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_OPEN_COMMAND = re.compile(
    r"\\(?:cdot|times|div|pm|mp|approx|sim|neq?|leq?|geq?|[lg]t|in|cup|cap|l?dots|binom)(?![A-Za-z])"
)
_IGNORED = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\[!,;:]|(?<!\\)\$|\\?%|\^ ?\{? ?\\circ ?\}?|\\degree\b"
)


class Symbolic:
    r"""A formula that equals the gold answer.

    Equal in value is right: \sqrt{4} for 2; but where a number is asked for, 1+1 is not worked out. Decimals are not
    rounded; per cent is a unit (50\% is 50, not 0.5); units and bases (11_2) agree where both sides name one. Words,
    letters and figures named by them (\angle ABC) are compared as text.
    """

    id = "symbolic-2"
    instruction = f'End with "{ANSWER_PHRASE} $\\boxed{{...}}$." and nothing after it.'

    def __init__(self) -> None:
        self._workers = Workers(SECONDS)
        # An answer is read more than once: for votes, and for its label.
        self._compare = lru_cache(1 << 16)(self._workers.compare)

    def __call__(self, question: Question, text: str) -> Grade:
        box = text.rfind(BOXED)
        # In a box the answer may close a formula ("the answer is 3 + 4 = ..."), and words may follow.
        stated = box < 0 or HEADED.phrase.search(text, box) is not None
        read = HEADED.read(text) if stated else _BOXES.read_box(text[:box] + text[box:].partition(_DRAWING)[0], box)
        if isinstance(read, Unreadable):
            return Grade("unparseable", detail=read.reason)
        gold, answer = trimmed(question.answer), read
        if _is_words(gold):
            return _by_text(_plain(gold), _plain(answer))
        if _FIGURE.search(gold):
            return _by_text(_squeezed(gold), _squeezed(answer))
        base = _NUMERAL.fullmatch(_squeezed(gold))
        if base is not None:
            plain = answer if _without_unit(answer)[1] else _squeezed(answer)
            return _by_text(base[1], _without_base(plain, base[2]))
        if "=" in answer and "=" not in gold:
            answer = _NAMED.sub("", answer)
        elif "=" in gold and "=" not in answer:
            gold = _NAMED.sub("", gold)
        (gold, gold_units), (answer, units) = _without_unit(gold), _without_unit(answer)
        said, wanted = number(answer), number(gold)
        words = {*(said.words if said is not None else ()), *_WORD.findall(" ".join(units))}
        measured = said is not None and said.words and wanted is None  # "5 kg" is no formula
        if measured or not are_units(words, question.prompt, question.answer):
            return Grade("unparseable", detail=f"not one value: {read!r}")
        if said is not None and wanted is not None:
            return Number(said.value, said.units | units).judge(Number(wanted.value, wanted.units | gold_units))
        if not _is_finished(answer, gold, wanted is not None):
            return Grade("unparseable", detail=f"not one value: {answer!r}")
        alike = _squeezed(answer) == _squeezed(gold)
        forms = {bool(_SET.fullmatch(_formula(each))): each for each in (gold, answer)}
        if len(forms) == 2 and _PAIR.fullmatch(_formula(forms[False])):
            return Grade("wrong", _squeezed(answer), "a set is no pair")
        comparison = self._compare(_formula(gold), _formula(answer))
        if "problem" in comparison and not alike:
            return Grade("unparseable", detail=comparison["problem"])
        spelled = str(said.value) if said is not None else comparison.get("answer") or _squeezed(answer)
        if units and gold_units and not units & gold_units:
            return Grade("wrong", spelled, "another unit")
        return Grade("right" if alike or comparison["equal"] else "wrong", spelled)


def _is_finished(answer: str, gold: str, gold_is_number: bool) -> bool:
    """Whether an answer is one value and no words change it; a number, where that is asked for, is worked out."""
    words = {word for wrapped in _WRAPPED.findall(answer) for word in _WORD.findall(wrapped.lower())}
    if words & NOT_UNITS - set(_WORD.findall(_WRAPPED.sub(r" \1 ", gold).lower())) or (
        "=" in answer and "=" not in gold
    ):
        return False
    if not gold_is_number:
        return True
    if re.fullmatch(r"-?[0-9.]{1,40} ?\\(?:times|cdot) ?10 ?\^ ?\{?-?[0-9]{1,6}\}?", answer):
        return True
    bare = _COMMAND.sub("", re.sub(r"\\log ?_", "", _WRAPPED.sub("", answer)))
    return (
        _OPEN_COMMAND.search(answer) is None
        and re.fullmatch(r"-?(?:[0-9{}()^,|\s\\]|\.(?!\.)|(?<=[{(])-)*", bare) is not None
    )


def _without_unit(text: str) -> tuple[str, frozenset[str]]:
    """A formula and the words of the unit after it; words that are none stay where they are."""
    match = _UNIT.search(text)
    words = _WORD.findall(_WRAPPED.sub(r"\1", match[0]).lower()) if match is not None else []
    if match is None or not NOT_UNITS.isdisjoint(words):
        units = set()
    else:
        text, power = text[: match.start()], re.search(r"\^ ?\{?([23])", match[0])
        units = set(unit_names(words, f"^{power[1]}" if power else "") - _ANY_UNIT)
    units |= {unit for mark, unit in _MARKS.items() if mark in text}
    return text, frozenset(units)


def _by_text(gold: str, answer: str) -> Grade:
    return Grade("right" if answer == gold else "wrong", answer)


def _without_base(answer: str, base: str) -> str:
    """A numeral without its base, where it names that one."""
    numeral = _NUMERAL.fullmatch(answer)
    return numeral[1] if numeral is not None and numeral[2] == base else answer


def _is_words(gold: str) -> bool:
    """Whether a gold answer is a word, a name or an option's letter, which no calculation can be right about."""
    return (
        re.fullmatch(r"[A-Z ]{1,40}|[A-Z]?[a-z]{3,40}( [A-Za-z]{1,40})*", _WRAPPED.sub(r"\1", gold).strip(" ()"))
        is not None
    )


def _plain(text: str) -> str:
    """Words as text: without LaTeX's wrappers and the parentheses of an option's letter."""
    return normalised(_squeezed(_WRAPPED.sub(r"\1", text)).strip("()"))


def _formula(text: str) -> str:
    """What a worker gets: without dollar signs, per cent signs and degrees."""
    return _IGNORED.sub("", text).strip()


def _squeezed(text: str) -> str:
    """One spelling of LaTeX that differs in spaces, sizes and braces around single digits only."""
    text = re.sub(r"\\[dt]frac", r"\\frac", _formula(text))
    text = re.sub(r"\\frac ?([0-9])([0-9])", r"\\frac{\1}{\2}", text)
    return "".join(text.replace("\\ ", " ").split())
