"""Debates that others held and wrote down, as turns of a store: text alone, encoded once and marked so."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from agentark_jax.data.render import Format
from agentark_jax.errors import UsageError
from agentark_jax.records import DEBATE, DEBATER, Call, Completion, Question, Sampling, Turn
from agentark_jax.tasks.config import FieldsConfig
from agentark_jax.tasks.items import make_question
from agentark_jax.tasks.own import find, parse_own, whole_text
from agentark_jax.tasks.rows import Row

WEIGHTS = "imported"


@dataclass(frozen=True)
class Debate:
    """A question and what each agent said in each round: `rounds[round][agent]`, None where one said nothing."""

    question: Question
    rounds: Sequence[Sequence[str | None]]


def read_debate(row: Row, fields: FieldsConfig, rounds: str, grader: str, task: str) -> Debate:
    """The debate of one row; `rounds` is the dotted path of its lists of texts.

    Raises:
        UsageError: the row lacks something or holds something else; names file and line.
    """
    item = parse_own(row, fields, grader)
    told = find(row, rounds)
    wanted = 'lists of texts, one for each round: [["agent 1", "agent 2"], ["agent 1", "agent 2"]]'
    if not isinstance(told, list) or not told or not all(isinstance(each, list) and each for each in told):
        raise UsageError(f'{row.where}: "{rounds}" must be {wanted}.')
    for said in told:
        if not all(text is None or (isinstance(text, str) and text.strip()) for text in said):
            raise UsageError(f'{row.where}: "{rounds}" must be {wanted}; null stands for an agent that said nothing.')
    whole = [[text and whole_text(row, rounds, text) for text in said] for said in told]
    return Debate(make_question(task, "debate", item), whole)


def turns_of(debate: Debate, form: Format, model: str) -> Iterator[Turn]:
    """The turns of a debate, round by round; each heard all of the round before it, as far as anyone knows.

    What was asked is not known, so prompts are empty; a model's name and the place in the debate are a call's key.
    """
    before: list[str] = []
    for round, said in enumerate(debate.rounds):
        keys = []
        for agent, text in enumerate(said):
            if text is None:
                continue
            ids = (*form.tokenizer.encode_text(text), form.stop_ids[0])
            call = Call(
                question_id=debate.question.id,
                protocol=DEBATE,
                agent=agent,
                role=DEBATER,
                round=round,
                sample=0,
                parents=tuple(before),
                model=model,
                weights=WEIGHTS,
                tokenizer=form.tokenizer.hash,
                template=form.hash,
                sampling=Sampling(1.0, len(ids), form.stop_ids, seed=0),
                prompt=(),
            )
            completion = Completion(np.asarray(ids, np.int32), None, text, "stop", 0, 0, 0.0)
            keys.append(call.key)
            yield Turn(call, 0, completion)
        before = keys
