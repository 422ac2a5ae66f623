"""A user's own questions: which columns of a file or a table hold what, and all that can be wrong with them.

Without further word they are {"question": …, "answer": …[, "rationale": …]}. Answers in GSM8K's way
("… <<3+4=7>> … #### 1,234") are understood: the gold answer follows "####", the text before it is the rationale.
"""

import difflib
from collections.abc import Iterable, Mapping
from decimal import Decimal
from string import ascii_uppercase
from typing import Any

from agentark_jax.errors import UsageError
from agentark_jax.tasks.config import FieldsConfig
from agentark_jax.tasks.grading.final_answer import grade_final_answer, normalised
from agentark_jax.tasks.grading.reading import ANSWER_PHRASE
from agentark_jax.tasks.items import Item, answered, split_gsm8k
from agentark_jax.tasks.rows import Row


def read_own(rows: Iterable[Row], fields: FieldsConfig, grader: str) -> tuple[list[Item], Mapping[str, int]]:
    """The different questions of the rows, and how many were read and how many of them were repeated.

    Raises:
        UsageError: a row is no usable question, or two rows answer one question differently; names file and line.
    """
    first: dict[str, tuple[Item, Row]] = {}
    count = 0
    for row in rows:
        count += 1
        item = parse_own(row, fields, grader)
        earlier, stands = first.setdefault(item.key, (item, row))
        if not _same(item.answer, earlier.answer, grader):
            raise UsageError(
                f"{row.where.rpartition(',')[0]}, lines {stands.line} and {row.line}: one question with two answers, "
                f"{earlier.answer!r} and {item.answer!r}; remove one of the lines."
            )
    return [item for item, _ in first.values()], {"read": count, "duplicates_dropped": count - len(first)}


def parse_own(row: Row, fields: FieldsConfig, grader: str) -> Item:
    """The question of one row. Raises UsageError where it cannot be used as it is."""
    question = _text(row, fields.question)
    context = _text(row, fields.context) if fields.context else ""
    choices = _choices(row, fields.choices)
    gold, way = _letter(row, fields.answer, choices), ""
    if not choices:
        gold, way = _gold(row, fields.answer, grader)
    if fields.rationale != FieldsConfig.rationale or find(row, fields.rationale) is not None:
        way = _text(row, fields.rationale)
    rationale = _checked(way, gold, question, row.where) if grader == "numeric" else answered(way, gold)
    # What stands in one context is asked of it: the same words about another are another question.
    return Item(question, gold, rationale, choices, (gold,) * (grader == "short"), context, context, row.line)


def find(row: Row, path: str) -> Any:
    """What a dotted path leads to: keys of objects, places (from 0) in lists. None where it leads nowhere."""
    value: Any = row.values
    if path in row.values:
        return row.values[path]
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _needed(row: Row, path: str) -> Any:
    content = find(row, path)
    if content is None:
        near = difflib.get_close_matches(path, row.values, n=3, cutoff=0.5)
        meant = f"Did you mean {' or '.join(near)}?" if near else f"It has: {', '.join(row.values) or 'nothing'}."
        raise UsageError(
            f'{row.where}: no "{path}"; every row needs a question and an answer in the columns of task.fields. {meant}'
        )
    return content


def _text(row: Row, path: str, number_allowed: bool = False) -> str:
    content, where = _needed(row, path), row.where
    if isinstance(content, float):
        content = Decimal(repr(content))
    if number_allowed and isinstance(content, int | Decimal) and not isinstance(content, bool):
        if not Decimal(content).is_finite():
            raise UsageError(f'{where}: "{path}" is of type float and no number; correct it or remove the row.')
        if abs(Decimal(content).adjusted()) > 50:
            raise UsageError(f'{where}: "{path}" is out of range; use a number of at most 50 digits.')
        content = format(Decimal(content), "f")
    if not isinstance(content, str):
        kinds = "text or a number" if number_allowed else "text"
        raise UsageError(f'{where}: "{path}" is of type {type(content).__name__}; make it {kinds}.')
    if not content.strip():
        raise UsageError(f'{where}: "{path}" is empty; fill it in or remove the line.')
    return whole_text(row, path, content)


def whole_text(row: Row, path: str, content: str) -> str:
    """A text of a row without white space around it. Raises UsageError where UTF-8 cannot hold it."""
    try:
        content.encode()
    except UnicodeEncodeError:
        raise UsageError(f'{row.where}: "{path}" contains half of a surrogate pair; remove it.') from None
    return content.strip()


def _choices(row: Row, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Several columns with a choice each, or one with a list of texts or an object from letters to texts."""
    if len(paths) == 1:
        found = _needed(row, paths[0])
        found = list(found.values()) if isinstance(found, Mapping) else found
    else:
        found = [_text(row, path, number_allowed=True) for path in paths]
    if not isinstance(found, list) or not all(isinstance(choice, str) and choice.strip() for choice in found):
        raise UsageError(f'{row.where}: "{paths[0]}" (task.fields.choices) is not a list of texts; make it one.')
    if paths and not 2 <= len(found) <= len(ascii_uppercase):
        raise UsageError(f"{row.where}: {len(found)} choices; give 2 to {len(ascii_uppercase)}.")
    return tuple(whole_text(row, paths[0], choice) for choice in found)


def _letter(row: Row, path: str, choices: tuple[str, ...]) -> str:
    """The letter of the right choice, given as a letter, as the choice's text, or as its place counted from 0."""
    if not choices:
        return ""
    content, letters = _needed(row, path), ascii_uppercase[: len(choices)]
    if isinstance(content, int) and not isinstance(content, bool) and 0 <= content < len(choices):
        return letters[content]
    if isinstance(content, str) and len(content.strip()) == 1 and content.strip() in letters:
        return content.strip()
    if isinstance(content, str) and choices.count(content.strip()) == 1:
        return letters[choices.index(content.strip())]
    raise UsageError(
        f'{row.where}: "{path}" is {content!r}, which is none of the choices; give a letter from A to {letters[-1]}, '
        f"the text of one choice, or its place from 0 to {len(choices) - 1}."
    )


def _gold(row: Row, path: str, grader: str) -> tuple[str, str]:
    """The gold answer and, from a GSM8K answer, its rationale."""
    gold, way = split_gsm8k(_text(row, path, number_allowed=True))
    if not gold:
        raise UsageError(f'{row.where}: "{path}" has nothing after "####"; add the final answer.')
    if grader == "numeric" and grade_final_answer(f"{ANSWER_PHRASE} {gold}.", gold).verdict != "right":
        raise UsageError(
            f'{row.where}: the answer {gold[:60]!r} cannot be graded; put a short final answer in "{path}" '
            'and the way to it in "rationale" (or before "####").'
        )
    return gold, way


def _checked(rationale: str, gold: str, question: str, where: str) -> str:
    """The rationale with the answer as its last sentence, unless it ends so already."""
    grade = grade_final_answer(rationale, gold, question)
    if grade.verdict == "wrong":
        raise UsageError(f'{where}: the rationale ends with {grade.answer!r}, but "answer" is {gold!r}; correct one.')
    ends_so = grade.verdict == "right" and rationale.endswith(f"{ANSWER_PHRASE} {gold}.")
    return rationale if ends_so else answered(rationale, gold)


def _same(answer: str, other: str, grader: str) -> bool:
    if grader == "numeric":
        return grade_final_answer(f"{ANSWER_PHRASE} {answer}.", other).verdict == "right"
    return normalised(answer) == normalised(other)
