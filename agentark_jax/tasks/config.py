"""Which questions are asked, and how hard they are."""

from dataclasses import dataclass

from agentark_jax.errors import UsageError

TASK_NAMES = ("word_problems",)
OPERATIONS = ("+", "-", "*")
MAX_STEPS = 6


@dataclass(frozen=True)
class TaskConfig:
    """The source of questions.

    Attributes:
        name: the built-in generator to use; ignored when `path` is set.
        path: a JSONL file (`.gz` too) of {"question", "answer"[, "rationale"]} that replaces the generator.
        seed: which questions are drawn, and in which order.
        steps: how many arithmetic steps a question may take; questions cycle through these counts.
        operations: which of "+", "-" and "*" a step may be.
        max_number: the largest first number, and the largest number added or taken away in one step.
        max_factor: the largest factor of a multiplication.
        max_value: no intermediate or final value exceeds this.
    """

    name: str = "word_problems"
    path: str | None = None
    seed: int = 0
    steps: tuple[int, ...] = (1, 2, 3)
    operations: tuple[str, ...] = OPERATIONS
    max_number: int = 9
    max_factor: int = 4
    max_value: int = 36

    def __post_init__(self) -> None:
        if self.name not in TASK_NAMES:
            raise UsageError(
                f"task.name is {self.name!r}; use one of: {', '.join(TASK_NAMES)}, "
                "or set task.path for your own questions."
            )
        if self.path is not None and not self.path:
            raise UsageError("task.path is empty; give a JSONL file, or null for the built-in generator.")
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


def _check_integer(key: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"task.{key} is {value!r}; give a whole number from {low} to {high}.")
