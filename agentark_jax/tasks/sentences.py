"""The words of the word problems: who, what, and the sentence forms of each operation.

In a form `{n}` is the operand, `{is}` agrees with it, and every other field is filled from the scene. Each form changes
the number of one kind of thing in one way; the tests check that no two forms can yield the same sentence.
"""

from collections.abc import Mapping
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Whoever acts on a person's things is of the other gender, so that each pronoun has one meaning.
WOMEN = _words("Mia Ann Eva Lily Rosa Nina Sara Emma Ella Lucy Amy Kate Maya Zoe Ruth Jane Anna Clara Tina Leah")
MEN = _words("Ben Tom Max Sam Leo Jack Omar Paul Adam Luke Noah Dan Carl Hugo Ivan Finn Raj Ken Eric Theo")
OBJECTS = _words(
    "apple pear plum coin marble book card shell stamp pencil cookie sticker button bead rock ball pen egg key ring "
    "nut cup hat toy"
)
CONTAINERS = _words("box bag jar basket drawer crate bowl chest")


@dataclass(frozen=True)
class Form:
    """A sentence of one step; `only` is the single operand that its words express without a digit."""

    text: str
    only: int | None = None


@dataclass(frozen=True)
class Scene:
    """A situation with one number in it: how it opens, how each operation changes the number, what is asked."""

    name: str
    openings: tuple[str, ...]
    forms: Mapping[str, tuple[Form, ...]]
    questions: tuple[str, ...]


def _forms(*texts: str | tuple[str, int]) -> tuple[Form, ...]:
    return tuple(Form(text) if isinstance(text, str) else Form(*text) for text in texts)


PERSON = Scene(
    "person",
    (
        "{name} has {n} {objects}.",
        "{name} owns {n} {objects}.",
        "{name} starts with {n} {objects}.",
        "At first {name} has {n} {objects}.",
        "{name} begins with {n} {objects}.",
        "{name} holds {n} {objects}.",
    ),
    {
        "+": _forms(
            "{she} buys {n} more",
            "{she} finds {n} more",
            "{she} gets {n} more",
            "{she} wins {n} more",
            "{she} collects {n} more",
            "{she} picks up {n} more",
            "{she} receives {n} more",
            "{she} makes {n} more",
            "{friend} gives {her} {n} more",
            "{friend} brings {her} {n} more",
            "{friend} sends {her} {n} more",
            "{friend} buys {her} {n} more",
            "a neighbor hands {her} {n} more",
            "{she} takes {n} more from a shelf",
        ),
        "-": _forms(
            "{she} gives away {n}",
            "{she} loses {n}",
            "{she} sells {n}",
            "{she} throws away {n}",
            "{she} donates {n}",
            "{she} uses up {n}",
            "{she} drops {n} into a river",
            "{she} gives {n} to {friend}",
            "{she} hands {friend} {n} of them",
            "{she} sends {friend} {n} of them",
            "{friend} takes {n} of them",
            "{friend} buys {n} from {her}",
            "{friend} wins {n} from {her}",
            "a thief steals {n} of them",
        ),
        "*": _forms(
            ("{she} doubles the number of {objects}", 2),
            ("{she} triples the number of {objects}", 3),
            "soon {she} has {n} times as many",
            "now {she} has {n} times that many",
            "the number of {objects} becomes {n} times as large",
            "{she} multiplies the number of {objects} by {n}",
            "{friend} multiplies the number of {objects} by {n}",
            "magic turns each {object} into {n}",
            "{she} swaps each {object} for {n} new ones",
            "{friend} trades {her} {n} {objects} for each {object}",
            "a machine makes {n} {objects} out of each {object}",
            "each {object} becomes {n} {objects}",
            "each {object} is replaced by {n} new ones",
            "a wizard makes {n} out of every {object}",
        ),
    },
    (
        "How many {objects} does {name} have now?",
        "How many {objects} does {she} have now?",
        "How many {objects} does {name} have in the end?",
        "How many {objects} does {she} have in the end?",
    ),
)

CONTAINER = Scene(
    "container",
    (
        "There are {n} {objects} in a {container}.",
        "A {container} holds {n} {objects}.",
        "{name} puts {n} {objects} in an empty {container}.",
        "A {container} has {n} {objects} in it.",
        "{name} fills a {container} with {n} {objects}.",
        "In a {container} there are {n} {objects}.",
    ),
    {
        "+": _forms(
            "{friend} puts in {n} more",
            "{friend} adds {n} more",
            "{friend} drops in {n} more",
            "{friend} throws in {n} more",
            "{friend} slips in {n} more",
            "{friend} places {n} more in it",
            "{friend} tosses {n} more into it",
            "{friend} packs {n} more into it",
            "{n} more {is} added",
            "{n} more {is} put in",
            "{n} more {is} placed inside",
            "{n} more {is} dropped into it",
        ),
        "-": _forms(
            "{friend} takes out {n}",
            "{friend} removes {n}",
            "{friend} pulls out {n}",
            "{friend} picks {n} out of it",
            "{friend} takes {n} from it",
            "{friend} carries off {n} of them",
            "{friend} throws out {n}",
            "{friend} steals {n} from it",
            "{n} {is} removed from it",
            "{n} {is} taken out of it",
            "{n} {is} pulled out of it",
            "{n} {is} stolen from it",
        ),
        "*": _forms(
            ("the number in it doubles", 2),
            ("the number in it triples", 3),
            "{friend} multiplies the number in it by {n}",
            "the number in it becomes {n} times as large",
            "soon it holds {n} times as many",
            "now it has {n} times that many in it",
            "{friend} swaps each {object} in it for {n} new ones",
            "{friend} replaces each {object} in it with {n} new ones",
            "each {object} in it turns into {n}",
            "each {object} in it is swapped for {n} others",
            "{friend} fills it until it holds {n} times as many",
            "a spell makes {n} {objects} out of each {object} in it",
        ),
    },
    (
        "How many {objects} are in the {container} now?",
        "How many {objects} does the {container} hold now?",
        "How many {objects} are in the {container} in the end?",
        "How many {objects} are in it now?",
    ),
)

SCENES = (PERSON, CONTAINER)
