"""What tests of process reward models share: word problems with planted errors, and a tiny student."""

from pathlib import Path

import numpy as np
from tiny_models import write_model

from agentark_jax.data.render import PlainFormat, step_example
from agentark_jax.data.steps import steps
from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.generation import Model
from agentark_jax.models.config import load_config
from agentark_jax.models.weights import weights_fingerprint
from agentark_jax.records import Call, Completion, Example, Question, Sampling, Turn
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems, exact_step_truth

TASK = WordProblems(TaskConfig(steps=(2, 3)))


def student(directory: Path, **changes) -> Model:
    """A tiny model with a tokenizer of word problems; `changes` of its shape."""
    directory.mkdir(parents=True)
    texts = [text for each in TASK.questions("warm_start", 200) for text in (each.prompt, each.rationale)]
    train_tokenizer(texts, 400, directory)
    write_model(directory, Tokenizer(directory).vocabulary_size, **{"max_positions": 256, **changes})
    form = PlainFormat(Tokenizer(directory))
    return Model("tiny", directory, weights_fingerprint(directory), load_config(directory), form)


def spoiled(question: Question, place: int) -> str:
    """The gold rationale with another result in step `place`, and in all that follows from it."""
    values = [question.meta["start"], *question.meta["values"]]
    lines = []
    for index, (operation, operand) in enumerate(
        zip(question.meta["operations"], question.meta["operands"], strict=True)
    ):
        before = values[index]
        after = {"+": before + operand, "-": before - operand, "*": before * operand}[operation]
        values[index + 1] = after + (index == place)
        lines.append(f"{before}{operation}{operand}={values[index + 1]}")
    return "\n".join([*lines, f"The answer is {values[-1]}."])


def turn_of(form: PlainFormat, question: Question, text: str, agent: int = 0, **changes) -> Turn:
    """A turn of a debate's first round that said a text."""
    ids = np.asarray(form.response(text), np.int32)
    values = {
        "question_id": question.id,
        "protocol": "debate",
        "agent": agent,
        "role": "debater",
        "round": 0,
        "sample": 0,
        "parents": (),
        "model": "tiny",
        "weights": "w0",
        "tokenizer": form.tokenizer.hash,
        "template": form.hash,
        "sampling": Sampling(1.0, 64, form.stop_ids, seed=agent),
        "prompt": ((1,),),
    }
    call = Call(**{**values, **changes})
    return Turn(call, 0, Completion(ids, np.full(len(ids), -0.5, np.float32), text, "stop", 1, 0, 0.1))


def planted(form: PlainFormat, split: str, count: int) -> list[Example]:
    """Of each question a right answer and one with a wrong step, all labelled as they are."""
    examples = []
    for number, question in enumerate(TASK.questions(split, count)):
        wrong = spoiled(question, number % len(question.meta["values"]))
        for agent, text in enumerate((question.rationale, wrong)):
            turn = turn_of(form, question, text, agent)
            texts = [step.text for step in steps(turn.completion.ids.tolist(), form.tokenizer)]
            truth = exact_step_truth(question, texts)
            assert truth is not None
            examples.append(step_example(form, question, turn, [float(right) for right in truth]))
    return examples
