"""Final answers that are one number (or a few plain words), and the two graders that judge them.

Numbers compare exactly as fractions; nothing is evaluated, and the work is linear in the text.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction

from agentark_jax.records import Grade, Question
from agentark_jax.tasks.grading.reading import (
    ANSWER_PHRASE,
    HEADED,
    MAX_ANSWER_LENGTH,
    STRICT,
    Reader,
    Unreadable,
    trimmed,
)

_FRACTION_COMMAND = re.compile(r"(?<![0-9])\\[dt]?frac\{([0-9]{1,40})\}\{([0-9]{1,40})\}(?![0-9])")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<currency>[$€£]) ?(?P<inner_sign>[+-]?))?"
    r"(?:(?P<numerator>[0-9]{1,40})/(?P<denominator>[0-9]{1,40})"
    r"|(?P<decimal>(?:[1-9][0-9]{0,2}(?:,[0-9]{3}){1,20}|[0-9]{1,60})(?:\.[0-9]{1,60})?|\.[0-9]{1,60}))"
    r"(?: ?(?P<symbol>[$€£%])| (?P<unit>[A-Za-z]{2,20}(?: [A-Za-z]{2,20})?))?"
)
_SYMBOL_UNITS = {"$": "dollar", "€": "euro", "£": "pound", "%": "percent"}
# Words after a number that change it, add to it or take it back; with one of them it is no plain number with a unit.
_NOT_UNIT_WORDS = """
    a about above after again almost also and another approximately around at away base because before below between
    billion billions bn but by couple crore crores cube cubed cubes dozen dozens each eight eighteen eighth eighths
    eighty either eleven else exactly except factorial false few fewer fifteen fifth fifths fifty five for forty four
    fourteen fourth fourths from grand greater gross guess half halves hardly hence hundred hundreds hundredth
    hundredths if in incorrect instead into is isn it just lakh lakhs larger least less lower maybe mil million millions
    minus mistake mn mod modulo more most multiplied nearly negative neither nine nineteen ninety ninth ninths no nor
    not nothing of off on one ones only or other otherwise out over per perhaps plus point positive possibly power
    probably quarter quarters raised rather remainder roughly score scores seven seventeen seventh sevenths seventy
    shy six sixteen sixth sixths sixty smaller so some squared squares tens ten tenth tenths than that the then there
    third thirds thirteen thirty this thousand thousands thousandth thousandths three through thus tie till times to
    trillion trillions twelve twenty twice two under unless until unsure up upto upwards versus vs wait was which
    whichever with without wrong zero
"""
NOT_UNITS = frozenset(_NOT_UNIT_WORDS.split())
# Units that a question need not name; any other must stand in it or in the gold answer. "5 quadrillion" is not 5.
_COMMON_UNITS = """
    altogether animal cent centimeter centimetre child children cm cu cubic cup day decade degree dollar euro feet foot
    ft gallon gram h hour hr inch inches item kg kilogram kilometer kilometre km kph lb left liter litre man men meter
    metre mg mi mile minute min ml mm month mph old ounce oz people percent percentage person piece pint pound quart
    remain remaining rupee s second sec square sq student thing together ton total unit usd way week woman women yard yd
    year yr
"""
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
# How LaTeX writes what a plain number may have: \text around units, spaces, thousands separators, degrees.
_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mbox) ?\{([A-Za-z /.$%]{0,40})\}")
_SEPARATOR = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!|\\[,;!])(?=[0-9]{3}(?![0-9]))")
_SPACE = re.compile(r"\\[,;: ]|(?<=[0-9A-Za-z}])~|\s+")
_DEGREES = re.compile(r"\^ ?\{? ?\\circ ?\}?|\\degree\b|°")
_MIXED = re.compile(
    r"(?<![0-9./,])([0-9]{1,40}) ?"
    r"(?:\\[dt]?frac\{([0-9]{1,40})\}\{([0-9]{1,40})\}|(?<= )([0-9]{1,40})/([0-9]{1,40}))(?![0-9])"
)
_RATE = re.compile(r"(?:(?<=[A-Za-z])/|(?<=[A-Za-z0-9$€£]) per )([A-Za-z]{1,20})\Z")


@dataclass(frozen=True)
class Number:
    """An exact number.

    `units` are what is named after it, in one spelling each, and agree where any of them does; `words` are all words
    that stand there.
    """

    value: Fraction
    units: frozenset[str]
    words: frozenset[str] = frozenset()

    def judge(self, gold: "Number") -> Grade:
        """Right where the values are equal and no two units are named."""
        if self.value != gold.value:
            return Grade("wrong", str(self.value))
        if self.units and gold.units and not self.units & gold.units:
            return Grade("wrong", str(self.value), "another unit")
        return Grade("right", str(self.value))


def grade_final_answer(text: str, gold: str, asked: str = "") -> Grade:
    """Judges the final answer of `text` to the question `asked` against `gold`, as `FinalAnswer` does."""
    return _grade(STRICT, plain_number, text, gold, asked)


class FinalAnswer:
    """One plain number with at most a currency, a per cent sign or a unit, or else the words of the gold answer.

    A numeric gold is compared as an exact fraction, a unit only where both sides name one. A word is a unit where it is
    a common one or the question or the gold answer has it. Any other gold is compared as normalised text (Unicode
    compatibility form, case, white space, closing period).
    """

    id = "final-answer-3"
    instruction = f'End with "{ANSWER_PHRASE} ..." and nothing after it.'

    def __call__(self, question: Question, text: str) -> Grade:
        return grade_final_answer(text, question.answer, question.prompt)


class Numeric:
    """As `FinalAnswer`, with numbers in LaTeX, mixed numbers and rates, and answers after "Answer:" or "A:" too."""

    id = "numeric-2"
    instruction = f'End with "{ANSWER_PHRASE} ...", the number alone, and nothing after it.'

    def __call__(self, question: Question, text: str) -> Grade:
        return _grade(HEADED, number, text, question.answer, question.prompt)


def _grade(reader: Reader, parse: Callable[[str], Number | None], text: str, gold: str, asked: str) -> Grade:
    read = reader.read(text)
    if isinstance(read, Unreadable):
        return Grade("unparseable", detail=read.reason)
    gold_number = parse(trimmed(gold))
    if gold_number is None:
        answer = normalised(read)
        return Grade("right" if answer == normalised(trimmed(gold)) else "wrong", answer)
    said = parse(read)
    if said is None or not are_units(said.words, asked, gold):
        return Grade("unparseable", detail=f"not one plain number: {read!r}")
    return said.judge(gold_number)


def are_units(words: Iterable[str], *texts: str) -> bool:
    """Whether all words after a number are units: common ones, or found, in singular or plural, in one of the texts."""
    for word in words:
        stem = _stem(word)
        if stem not in _COMMON_STEMS and not any(
            re.search(rf"(?<![A-Za-z]){stem}[eisy]{{0,4}}(?![A-Za-z])", text, re.I) for text in texts
        ):
            return False
    return True


def unit_names(words: Iterable[str], power: str = "") -> frozenset[str]:
    """One spelling of the units that words name: "apple" and "apples", "square cm" and "cm" to the `power` "^2"."""
    words = list(words)
    measured = [word for word in words if word not in _POWERS]
    powers = [_POWERS[word] for word in words if word in _POWERS]
    if not measured:
        return frozenset(words)
    return frozenset(_stem(word) + (power or "".join(powers[:1])) for word in measured)


def _stem(word: str) -> str:
    """The same for singular and plural: "berry" and "berries", "box" and "boxes"."""
    return word.lower().rstrip("eisy") or word.lower()


_COMMON_STEMS = frozenset(_stem(word) for word in _COMMON_UNITS.split())


def normalised(text: str) -> str:
    """One spelling per text: Unicode compatibility form, case-folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def number(text: str) -> Number | None:
    """As `plain_number`, from LaTeX as well; mixed numbers ("3 1/2") and rates ("60 miles per hour") too."""
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    if text.startswith(("\\(", "\\[")) and text.endswith(("\\)", "\\]")):
        text = text[2:-2]
    text = _TEXT.sub(r" \1 ", text)
    text = _DEGREES.sub(" degrees ", _SEPARATOR.sub(",", text))
    text = _SPACE.sub(" ", text.replace("{,}", ",").replace("\\!", "")).strip()
    text = text.replace("per cent", "percent")
    rate = _RATE.search(text)
    if rate is None or rate[1].lower() in NOT_UNITS:
        return plain_number(_MIXED.sub(_improper, text))
    found = plain_number(_MIXED.sub(_improper, text[: rate.start()]))
    return found and replace(found, words=found.words | {rate[1]})


def _improper(mixed: re.Match[str]) -> str:
    whole, numerator, denominator = (int(part) for part in mixed.groups() if part is not None)
    return f"{whole * denominator + numerator}/{denominator}" if numerator < denominator else mixed[0]


def plain_number(text: str) -> Number | None:
    """One plain number with at most a currency, a per cent sign or a unit of one or two words; None for all else."""
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    text = text.replace("−", "-").replace("\\$", "$").replace("\\%", "%")
    text = _FRACTION_COMMAND.sub(r"\1/\2", text)
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["inner_sign"]) or (match["currency"] and match["symbol"]):
        return None
    words = (match["unit"] or "").lower().split()
    if any(word in NOT_UNITS for word in words):
        return None
    if match["denominator"] is not None:
        if int(match["denominator"]) == 0:
            return None
        value = Fraction(int(match["numerator"]), int(match["denominator"]))
    else:
        value = Fraction(match["decimal"].replace(",", ""))
    if "-" in (match["sign"], match["inner_sign"]):
        value = -value
    symbol = match["currency"] or match["symbol"]
    units = unit_names(words) | ({_SYMBOL_UNITS[symbol]} if symbol else set())
    return Number(value, units, frozenset(words))
