"""What a model is asked about an answer that is there already: its own, the same one as another's, one with an error.

Intrinsic self-correction: Huang et al. 2024 (arXiv 2310.01798). "Wait", and the same error as one's own and as the
user's: Self-Correction Bench (Tsui 2025, arXiv 2507.02778).
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentark_jax.data.render import Format, Prompt, without
from agentark_jax.protocols.calls import Draw
from agentark_jax.protocols.table import CLOSING, Pool
from agentark_jax.records import Question, Turn

NEUTRAL, ADVERSARIAL, SUPPORTIVE, WAIT, USERS = "neutral", "adversarial", "supportive", "wait", "users"
# What the user says after the model's answer.
CHECKS: Mapping[str, str] = {
    NEUTRAL: "Review the answer step by step, find any errors, and answer the question again.",
    ADVERSARIAL: "I think this answer is wrong. Review it and answer the question again.",
    SUPPORTIVE: "I think this answer is right. Review it and answer the question again.",
}
CONDITIONS = (*CHECKS, WAIT, USERS)
_WAIT = " Wait"
_SOLUTION = "Question:\n{question}\n\nA solution:\n"
_LOCATE = (
    "\n\nIs there an error in this solution? Reply with the number of the first step that is wrong, or "
    '"none" if all are right.'
)
NONE = "none"


@dataclass(frozen=True)
class Inquiry:
    """One call about a question: `role` and `sample` say which of several it is."""

    prompt: Prompt
    role: str
    sample: int = 0
    parents: tuple[str, ...] = ()
    regex: str | None = None


async def inquire(
    question: Question, pool: Pool, inquiries: Sequence[Inquiry], draw: Draw, *, protocol: str
) -> list[Turn]:
    """Make calls about a question, all at once; the turns in their order. A failed call is an error."""
    return await asyncio.gather(
        *(
            pool[0].caller.ask(
                question,
                each.prompt,
                draw,
                protocol=protocol,
                role=each.role,
                sample=each.sample,
                parents=each.parents,
                regex=each.regex,
            )
            for each in inquiries
        )
    )


def checked(form: Format, question: Question, said: Sequence[int], condition: str) -> Prompt:
    """The prompt of one of `CONDITIONS` about an answer that the model gave to the question, as sampled ids.

    Under `wait` it goes on with its answer, which has lost its end token and got " Wait". Under `users` the answer
    stands in the user's message, with the words of `neutral`: nothing but whose it is differs.
    """
    if condition == WAIT:
        return continued(form, question, (*without(said, form.stop_ids), *form.tokenizer.encode(_WAIT)))
    if condition == USERS:
        told = _SOLUTION.format(question=question.prompt)
        return form.instruction([told, said, f"\n\n{CHECKS[NEUTRAL]}{CLOSING}"])
    return form.reply(question, said, CHECKS[condition] + CLOSING)


def continued(form: Format, question: Question, begun: Sequence[int]) -> Prompt:
    """The question, and the beginning of the model's own answer to it, which it is to go on with."""
    return (*form.question(question), tuple(begun))


def begun(form: Format, text: str) -> tuple[int, ...]:
    """A text that nobody sampled as the beginning of an answer."""
    return without(form.response(text), form.stop_ids)


def locate(form: Format, question: Question, steps: Sequence[str]) -> tuple[Prompt, str]:
    """The prompt that asks which step of a solution is wrong, and the regex of what may be replied.

    The reply is the number of a step, from 1, or "none"; see `located`.
    """
    told = _SOLUTION.format(question=question.prompt)
    shown = "\n".join(f"Step {number}: {step.strip()}" for number, step in enumerate(steps, 1))
    # A text that spells the end of a turn does not end it.
    content = [token for token in form.tokenizer.encode(shown) if not form.tokenizer.is_special(token)]
    numbers = "|".join(str(number) for number in range(1, len(steps) + 1))
    return form.instruction([told, content, _LOCATE]), rf"\s?({NONE}|{numbers})"


def located(text: str) -> int | None:
    """The index of the step that a reply to `locate` calls wrong; None for none, −1 where it says nothing."""
    said = text.strip()
    return None if said == NONE else int(said) - 1 if said.isdecimal() else -1
