"""The letter of one of several choices."""

import re
from collections.abc import Sequence
from itertools import islice

from agentark_jax.errors import AgentArkError
from agentark_jax.records import Grade, Question
from agentark_jax.tasks.grading.final_answer import normalised
from agentark_jax.tasks.grading.reading import (
    ANSWER_PHRASE,
    BOXED,
    MAX_ANSWER_LENGTH,
    STRICT,
    sentence_before,
    starts_a_sentence,
)

LETTERS = "ABCDEFGHIJ"
# A text that states more answers gives none.
MOST_STATED = 1000

_MARKUP = " \t\n:.$*_\\()[]{}"
_KIND = r"(?:answer|option|choice)"
_ANNOUNCED = re.compile(
    rf"^[ \t]{{0,4}}#{{1,6}} ?(?:(?:updated|final|correct) )?{_KIND}[ \t]*$"
    rf"|\bthe\s{{1,4}}(?:(?:final|correct|best|right|most likely)\s{{1,4}}){{0,2}}{_KIND}\s{{1,4}}is\b:?"
    r"|^[ \t]{0,4}####(?!#)"
    rf"|^[ \t]{{0,4}}(?:[*#]{{1,4}} ?)?(?:(?:the )?(?:(?:updated|final|correct|best) )?{_KIND}|(?-i:A))(?:\*\*)?:",
    re.I | re.A | re.M,
)
_BOX = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]{0,200}\}){0,200})\}")
_WRAPPER = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox) ?\{([^{}\\]{0,200})\}")
# A letter, by itself or in parentheses, and what is said after it.
_LETTER = re.compile(
    r"(?:(?:option|choice|answer) )?(?:\((?P<a>[A-Za-z])\)|(?P<b>[A-J])(?![A-Za-z0-9'’-]))(?P<rest>.*)", re.S
)
_WORD = re.compile(r"[A-Za-z]{2}")
_LONE_LETTER = re.compile(r"(?<![A-Za-z0-9'’-])(?:[A-J](?![A-Za-z0-9'’-])|\([a-j]\))")
_REASON = re.compile(r"[.,;:]?\s*(?:because|since|as)\b|[.;,:—–-]?\s*\n|\.\s")
_DOUBT = re.compile(
    r"n't\b|\b(?:not|or|wait|no|actually|maybe|perhaps|wrong|incorrect|unless|either|neither|both)\b", re.I
)


class Choice:
    """The letter that a text gives, or the words of exactly one choice.

    `question.meta["choices"]` are the choices in order, or how many there are; `question.answer` is the letter. Every
    answer that a text states must name the same letter. A letter in lower case counts in parentheses or a box only: "a"
    is an article.
    """

    id = "choice-3"
    instruction = f'End with "{ANSWER_PHRASE} (X)", X the letter of your choice, and nothing after it.'

    def __call__(self, question: Question, text: str) -> Grade:
        choices = _choices(question)
        stated = _stated(text, choices)
        if not stated:
            return Grade("unparseable", detail="no answer phrase")
        letters = {_letter(statement, choices) for statement in stated}
        if None in letters:
            return Grade("unparseable", detail="not the letter or the words of one choice")
        if len(letters) > 1:
            return Grade("unparseable", detail=f"several letters: {', '.join(sorted(map(str, letters)))}")
        (letter,) = letters
        return Grade("right" if letter == question.answer else "wrong", str(letter))


def _choices(question: Question) -> Sequence[str]:
    given = question.meta.get("choices")
    choices = [""] * given if isinstance(given, int) else list(given or ())
    if not 2 <= len(choices) <= len(LETTERS) or question.answer not in LETTERS[: len(choices)]:
        raise AgentArkError(
            f"question {question.id}: {len(choices)} choices with answer {question.answer!r}; its meta needs "
            f'"choices", 2 to {len(LETTERS)} of them, and its answer must be the letter of one.'
        )
    return [normalised(str(choice)).rstrip(".") for choice in choices]


def _stated(text: str, choices: Sequence[str]) -> list[str]:
    """Each statement of an answer, up to the next, boxes among them; without any, a text of one line is one itself.

    A line that begins with "####" and a word that is no choice is a heading. So is "### Answer" over words that name no
    choice, where another statement follows.
    """
    announced, boxes = (list(islice(each.finditer(text), MOST_STATED + 1)) for each in (_ANNOUNCED, _BOX))
    if len(announced) + len(boxes) > MOST_STATED:
        return []
    places = [(match.start(), match.end(), "") for match in announced if _announces(match, text, choices)]
    for box in boxes:
        doubted = STRICT.doubt.search(sentence_before(text, box.start()).replace(BOXED, ""))
        # A letter in lower case is one in a box, as in parentheses.
        places.append((box.start(), box.end(), "?" if doubted else re.sub(r"\A([a-z])\Z", r"(\1)", box[1].strip())))
    places.sort()
    if not places and len(text) <= MAX_ANSWER_LENGTH and "\n" not in text.strip():
        return [text]
    starts = [start for start, *_ in places] + [len(text)]
    statements = [
        content + text[end:next]
        for (start, end, content), next in zip(places, starts[1:], strict=True)
        if next == len(text) or not _is_preamble(text[start:end], text[end:next], choices)
    ]
    # "The answer is" right before a box says no more than the box.
    return [statement for statement in statements if statement.strip(_MARKUP)]


def _is_preamble(heading: str, section: str, choices: Sequence[str]) -> bool:
    """Whether what stands under a heading leads to a later statement, naming no choice itself."""
    if not heading.lstrip().startswith("#") or _LONE_LETTER.search(section):
        return False
    return _WORD.match(section.strip(_MARKUP)) is not None and _letter(section, choices) is None


def _announces(match: re.Match[str], text: str, choices: Sequence[str]) -> bool:
    if match.group().strip() == "####":
        end = text.find("\n", match.end())
        line = text[match.end() : end if end >= 0 else len(text)][:MAX_ANSWER_LENGTH].strip(" \t*_")
        return _LETTER.match(line) is not None or _WORD.match(line) is None or _letter(line, choices) is not None
    if match.group().strip(" \t*#") == "A:" and _LETTER.match(text[match.end() :][:40].strip(" \t*_")) is None:
        # Before the words of a choice "A:" may be that choice's letter.
        return False
    return match.group()[-1] == ":" or starts_a_sentence(text[max(0, match.start() - 200) : match.start()])


def _letter(statement: str, choices: Sequence[str]) -> str | None:
    """The letter of a statement; None where it names none, several, or takes back what it names."""
    plain = _WRAPPER.sub(r"\1", statement).translate(dict.fromkeys(map(ord, "*$\\{}[]_"), " ")).strip()
    words = normalised(plain).rstrip(".")
    named = {letter for letter, choice in zip(LETTERS, choices, strict=False) if choice and choice == words}
    match = _LETTER.match(plain)
    found = match and _choice_of(match, choices)
    if match is not None and found is not None:
        letter, choice = found
        rest = match["rest"].strip()
        first, line_break, others = rest.partition("\n")
        reason = line_break + others if choice and _words(first) == choice else match["rest"]
        if not _words(rest) or _words(rest) == choice or _is_reason(reason):
            named.add(letter)
    return named.pop() if len(named) == 1 else _letter_on_a_line(plain, choices)


def _letter_on_a_line(statement: str, choices: Sequence[str]) -> str | None:
    """The letter of a line that is a letter with the words of its choice, the only one named and nothing in doubt."""
    if len(_LONE_LETTER.findall(statement)) != 1 or _DOUBT.search(statement):
        return None
    for line in statement.split("\n"):
        match = _LETTER.fullmatch(line.strip(" \t:."))
        if match is not None:
            found, words = _choice_of(match, choices), _words(match["rest"])
            return found[0] if found is not None and words and words == found[1] else None
    return None


def _choice_of(match: re.Match[str], choices: Sequence[str]) -> tuple[str, str] | None:
    """The letter that is said and the words of its choice; None where there is no such choice."""
    letter = (match["a"] or match["b"]).upper()
    place = LETTERS.find(letter)
    return (letter, choices[place]) if 0 <= place < len(choices) else None


def _words(text: str) -> str:
    return normalised(text).strip(" .:,-–—)")


def _is_reason(rest: str) -> bool:
    return _REASON.match(rest) is not None and not _LONE_LETTER.search(rest) and not _DOUBT.search(rest)
