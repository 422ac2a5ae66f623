"""Which questions are asked, and how hard they are."""

import difflib
from dataclasses import dataclass, field
from typing import Any

from agentark_jax.errors import UsageError
from agentark_jax.tasks.datasets import DATASETS
from agentark_jax.tasks.grading import GRADERS

WORD_PROBLEMS = "word_problems"
TASK_NAMES = (WORD_PROBLEMS, *DATASETS)
OPERATIONS = ("+", "-", "*")
MAX_STEPS = 6


@dataclass(frozen=True)
class FieldsConfig:
    """In which columns of your own questions what stands; a dotted path goes into objects and lists ("qa.0.text").

    Attributes:
        question: the question.
        answer: the answer; among choices a letter, the text of one, or its place counted from 0.
        rationale: the way to the answer; may be missing where it is not set here.
        choices: one column with a list of choices, or several with one each; none where there are no choices.
        context: what is to be read before the question; none where there is nothing.
    """

    question: str = "question"
    answer: str = "answer"
    rationale: str = "rationale"
    choices: tuple[str, ...] = ()
    context: str | None = None


@dataclass(frozen=True)
class HubConfig:
    """A dataset of your own choice on the hub, whose columns `task.fields` names.

    Attributes:
        id: its id, or a directory laid out like one.
        config: one of its configurations, where it has several.
        split: the split that all questions are taken from.
    """

    id: str
    config: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class GymConfig:
    """A generator of the library reasoning-gym, which the extra `gym` installs.

    Attributes:
        generator: its name; README lists those that are taken.
        parameters: those of its parameters that differ from the defaults.
    """

    generator: str
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskConfig:
    """The source of questions.

    Attributes:
        name: a dataset (README lists them), or word_problems, the built-in generator. Your own questions, which `path`
            or `hub` names, take the generator's place.
        path: a file of questions (.jsonl, .json, .gz of these, .parquet); with a dataset's name, the file or directory
            to read it from instead of the hub.
        hub: a dataset on the hub that is not known by name.
        gym: a generator of the library reasoning-gym, in the place of the built-in one.
        fields: the columns of your own questions.
        grader: what judges answers to your own questions: numeric (the default), symbolic, choice (the default where
            there are choices), short, or final_answer, the built-in generator's.
        held_out: another dataset that held-out questions are taken from; otherwise a dataset's own test set, or some
            of your own questions. With those it is read from the folder of its name beside the file, or else the hub.
        shots: how many solved examples stand before each question, drawn from those of the warm start.
        seed: which questions are drawn, and in which order.
        steps: how many arithmetic steps a question may take; questions cycle through these counts.
        operations: which of "+", "-" and "*" a step may be.
        max_number: the largest first number, and the largest number added or taken away in one step.
        max_factor: the largest factor of a multiplication.
        max_value: no intermediate or final value exceeds this.
    """

    name: str = WORD_PROBLEMS
    path: str | None = None
    hub: HubConfig | None = None
    gym: GymConfig | None = None
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    grader: str | None = None
    held_out: str | None = None
    shots: int = 0
    seed: int = 0
    steps: tuple[int, ...] = (1, 2, 3)
    operations: tuple[str, ...] = OPERATIONS
    max_number: int = 9
    max_factor: int = 4
    max_value: int = 36

    def __post_init__(self) -> None:
        if self.name not in TASK_NAMES:
            near = difflib.get_close_matches(self.name, TASK_NAMES, n=3, cutoff=0.4)
            raise UsageError(
                f"task.name is {self.name!r}; use {'one of' if not near else 'perhaps'}: "
                f"{', '.join(near or TASK_NAMES)}, or set task.path or task.hub for your own questions, or task.gym."
            )
        if self.path is not None and not self.path:
            raise UsageError("task.path is empty; give a file of questions, or null.")
        self._check_own()
        if self.held_out is not None:
            tests = [name for name, dataset in DATASETS.items() if dataset.test is not None]
            if self.held_out not in tests:
                raise UsageError(f"task.held_out is {self.held_out!r}; use one of: {', '.join(tests)}, or null.")
            if self.name == WORD_PROBLEMS and self.path is None and self.hub is None:
                raise UsageError(
                    "task.held_out goes with questions that are read: set task.name to a dataset, or task.path or "
                    "task.hub for your own; or leave it null."
                )
        _check_integer("shots", self.shots, 0, 100)
        _check_integer("seed", self.seed, 0, 2**63 - 1)
        _check_integer("max_number", self.max_number, 2, 10**6)
        _check_integer("max_factor", self.max_factor, 2, 10**3)
        _check_integer("max_value", self.max_value, 2, 10**9)
        if not self.steps or len(set(self.steps)) != len(self.steps):
            raise UsageError(f"task.steps is {list(self.steps)}; give at least one step count and none twice.")
        for count in self.steps:
            _check_integer("steps", count, 1, MAX_STEPS)
        if not self.operations or len(set(self.operations)) != len(self.operations):
            raise UsageError(f"task.operations is {list(self.operations)}; give at least one and none twice.")
        for operation in self.operations:
            if operation not in OPERATIONS:
                raise UsageError(f"task.operations contains {operation!r}; use some of: {', '.join(OPERATIONS)}.")

    @property
    def title(self) -> str:
        """What the questions are, for a report."""
        if self.gym is not None:
            return f"{self.gym.generator} of reasoning-gym"
        if self.name != WORD_PROBLEMS or (self.path is None and self.hub is None):
            return self.name
        return "questions from a file" if self.hub is None else self.hub.id

    def _check_own(self) -> None:
        """What concerns a user's own questions goes with these alone."""
        own = self.name == WORD_PROBLEMS and (self.path is not None or self.hub is not None)
        given = {"gym": self.gym, "hub": self.hub, "path": self.path, "name": self.name != WORD_PROBLEMS or None}
        sources = [key for key, value in given.items() if value is not None]
        if len(sources) > 1 and sources[0] in ("gym", "hub"):
            raise UsageError(f"task.{sources[0]} and task.{sources[1]} are both set; leave one out.")
        if not own and (self.fields != FieldsConfig() or self.grader is not None):
            key = "fields" if self.fields != FieldsConfig() else "grader"
            raise UsageError(
                f"task.{key} is for your own questions; leave it out, or leave out task.name and set task.path or "
                "task.hub."
            )
        if not own and self.shots and self.name == WORD_PROBLEMS:
            raise UsageError("task.shots is for questions that are read; set it to 0 for those of a generator.")
        if self.grader is not None and self.grader not in GRADERS:
            raise UsageError(f"task.grader is {self.grader!r}; use one of: {', '.join(GRADERS)}.")


def _check_integer(key: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"task.{key} is {value!r}; give a whole number from {low} to {high}.")
