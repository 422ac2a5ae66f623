"""Settings of how questions and answers become token ids."""

from dataclasses import dataclass
from datetime import date

from agentark_jax.errors import UsageError

FORMATS = ("auto", "plain", "chat")


@dataclass(frozen=True)
class PromptConfig:
    """How questions and answers become prompts.

    Attributes:
        format: `plain` (for base models), `chat` (the model's own chat template), or `auto`: `chat` where the model
            directory has a template, else `plain`.
        system: the system message of every conversation (`chat` only); empty leaves it to the template.
        thinking: whether a template with that choice (Qwen3's `enable_thinking`) lets the model think first.
        date: the day, as YYYY-MM-DD, that a template takes for today (Llama 3.2 states it in every prompt); it is fixed
            so that the same config gives the same prompts on every day.
    """

    format: str = "auto"
    system: str = ""
    thinking: bool = False
    date: str = "2024-07-26"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"prompt.format is {self.format!r}: give one of {', '.join(FORMATS)}.")
        if self.format == "plain" and self.system:
            raise UsageError("prompt.system is set, but the plain format has no system message: leave it empty.")
        try:
            date.fromisoformat(self.date)
        except ValueError:
            raise UsageError(f"prompt.date is {self.date!r}: give a day as YYYY-MM-DD.") from None
