"""How long real debate traces are: tokens of prompt and completion, numbers only, in `trace_lengths.json`.

python -m benchmarks.trace_lengths --store runs/quickstart/traces.sqlite --debates gpt-4o-mini_multipersona.jsonl.gz

`short`: the answers of the debaters of a store, here that of the quickstart. `long`: the agents' answers in debates
that others published, with the columns of MedMCQA debates in xk-huang/medagents-benchmark. Each is counted as the
example that a student learns from (the question alone, then the answer), in the tokens of the model.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from agentark_jax.data.chat import make_format
from agentark_jax.data.config import PromptConfig
from agentark_jax.data.packing import shuffled
from agentark_jax.data.render import Format, turn_example
from agentark_jax.errors import AgentArkError
from agentark_jax.files import write_text
from agentark_jax.models.gguf import resolve_model
from agentark_jax.records import DEBATER, Question, Turn
from agentark_jax.tasks.config import FieldsConfig
from agentark_jax.tasks.rows import read_file
from agentark_jax.traces.foreign import read_debate, turns_of
from agentark_jax.traces.store import TraceStore

PATH = Path(__file__).resolve().parent / "trace_lengths.json"
MOST = 300
COLUMNS = FieldsConfig(answer="answer_idx", choices=tuple(f"options.{letter}" for letter in "ABCD"))
ROUNDS = "raw_responses"

Pair = tuple[int, int]
"""Tokens of a prompt and of the completion after it."""


def lengths(kind: str, path: Path = PATH) -> list[Pair]:
    """The pairs of `short` or `long`, in the order of the file."""
    return [(prompt, completion) for prompt, completion in json.loads(path.read_text())[kind]["pairs"]]


def of_turns(form: Format, turns: Iterator[tuple[Question, Turn]]) -> list[Pair]:
    """The pairs of up to 300 turns, drawn without looking at them."""
    pairs = []
    for question, turn in turns:
        weights = turn_example(form, question, turn, variant="lengths").weights["completion"]
        completion = int(np.count_nonzero(weights))
        pairs.append((len(weights) - completion, completion))
    return [pairs[index] for index in shuffled(len(pairs), seed=0, epoch=0)[:MOST]]


def of_store(path: Path) -> Iterator[tuple[Question, Turn]]:
    """All answers of debaters, with their questions."""
    with TraceStore(path, read_only=True) as store:
        questions = {question.id: question for question in store.questions()}
        for turn in store.turns(role=DEBATER, errors=False):
            yield questions[turn.call.question_id], turn


def of_debates(path: Path, form: Format) -> Iterator[tuple[Question, Turn]]:
    """All answers of the agents in a published file, with their questions."""
    for row in read_file(path, "--debates"):
        debate = read_debate(row, COLUMNS, ROUNDS, "choice", "medmcqa")
        for turn in turns_of(debate, form, "published"):
            yield debate.question, turn


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when the file was written."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trace_lengths",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--store", type=Path, required=True, help="a store with debates")
    parser.add_argument("--debates", type=Path, required=True, help="debates as others published them (JSON Lines)")
    parser.add_argument("--model", default="gguf:gemma3-270m", help="whose tokens are counted")
    parser.add_argument("--out", type=Path, default=PATH, help="the file to write (default: beside this)")
    options = parser.parse_args(arguments)
    try:
        form = make_format(resolve_model(options.model, weights=False), PromptConfig())
        found = {
            "short": (options.store, of_turns(form, of_store(options.store))),
            "long": (options.debates, of_turns(form, of_debates(options.debates, form))),
        }
        entries = [
            f' "{kind}": {{\n  "source": {json.dumps("/".join(path.parts[-2:]))},\n  "sha256": "{_sha256(path)}",\n'
            f'  "pairs": {json.dumps(pairs)}\n }}'
            for kind, (path, pairs) in found.items()
        ]
        write_text(
            options.out,
            f'{{\n "tokens_of": {json.dumps(options.model)},\n "tokenizer": "{form.tokenizer.hash}",\n'
            + ",\n".join(entries)
            + "\n}\n",
        )
    except AgentArkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
