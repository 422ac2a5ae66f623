"""The `Task` protocol and the way from a `TaskConfig` to a task."""

from collections.abc import Mapping
from typing import Protocol

from agentark_jax.errors import UsageError
from agentark_jax.records import Grade, Question
from agentark_jax.tasks.config import WORD_PROBLEMS, TaskConfig

# Which questions teach the format, which are debated, which measure, and which watch a training run.
SPLITS = ("warm_start", "debate", "held_out", "validation")


class Task(Protocol):
    """A source of questions together with what counts as a right answer."""

    @property
    def name(self) -> str: ...

    @property
    def grader_id(self) -> str:
        """Name and version of the grader; changes whenever a verdict could change."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """How many questions were read and how many of them were dropped, by reason; empty for the built-in ones."""
        ...

    def questions(self, split: str, count: int) -> list[Question]:
        """The first `count` questions of a split.

        Splits never share a question, and a larger count only appends. Raises UsageError when there are too few.
        """
        ...

    def grade(self, question: Question, text: str) -> Grade:
        """The verdict on one model output. Never runs it, never guesses."""
        ...


def make_task(config: TaskConfig, sizes: Mapping[str, int]) -> Task:
    """The task that a config describes.

    Args:
        config: the source of questions.
        sizes: for each split that the run uses, how many questions it will ask for at most. Every stage of a run must
            give the same sizes: a file of questions is cut into the splits by them.

    Raises:
        UsageError: a split does not exist, a size is negative, or the questions cannot be used as they are.
    """
    # A task module needs SPLITS from here.
    from agentark_jax.tasks.drawn import dataset_task, own_task
    from agentark_jax.tasks.gym import gym_task
    from agentark_jax.tasks.word_problems import WordProblems

    for split, size in sizes.items():
        check_request(split, size)
    if config.name != WORD_PROBLEMS:
        return dataset_task(config, sizes)
    if config.gym is not None:
        return gym_task(config, sizes)
    if config.path is not None or config.hub is not None:
        return own_task(config, sizes)
    return WordProblems(config)


def check_request(split: str, count: int) -> None:
    """Raises UsageError for a split that does not exist or a negative count."""
    if split not in SPLITS:
        raise UsageError(f"there is no split {split!r}; use one of: {', '.join(SPLITS)}.")
    if count < 0:
        raise UsageError(f"the split {split!r} was asked for {count} questions; give 0 or more.")
