"""How peers can divide a batch: where the choices of `sft.CASES` come from.

python -m benchmarks.sft_ways --case full_long
python -m benchmarks.sft_ways --case full_short --ways 16,padding_free 16 8 4 1 16,padding_free,compile

Each way runs alone: a step to warm up, then two timed ones. A way is the number of traces at a time, and what is set
besides: `padding_free`, or `compile` (torch.compile). The losses of the first step must agree with ours.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.config import load_config
from agentark_jax.models.gguf import resolve_model
from benchmarks.models import random_model
from benchmarks.sft import CASES, OURS, PEERS, TRL, Case, compare_losses, sides_of
from benchmarks.sft_inputs import draw, loss_tokens, totals
from benchmarks.workers import Reply, Side, Worker

SETTINGS = ("padding_free", "compile")


def divided(side: Side, way: str) -> Side:
    """A peer's side that divides its batch in this way. Raises UsageError for a way that there is not."""
    size, *settings = way.split(",")
    if not size.isdigit() or int(size) < 1 or side.setup["batch"] % int(size) or set(settings) - set(SETTINGS):
        raise UsageError(
            f"--ways: {way!r} is none; give a divisor of {side.setup['batch']}, and after commas some of "
            f"{', '.join(SETTINGS)}"
        )
    more = {setting: setting in settings for setting in SETTINGS}
    return dataclasses.replace(side, name=f"{side.name}, {way}", setup={**side.setup, "per_device": int(size), **more})


def ways_of(batch: int) -> list[str]:
    """All sizes that divide a batch by powers of two, and all of it, or half, in one row."""
    sizes = [batch >> power for power in range(batch.bit_length()) if batch % (1 << power) == 0]
    return [*map(str, sizes), *(f"{size},padding_free" for size in sizes[:2])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line per way. Exit code 0 when all agree."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sft_ways", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=[case.name for case in CASES], default=CASES[0].name)
    parser.add_argument("--peer", choices=list(PEERS), default=TRL)
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="default: all sizes, and two in one row")
    parser.add_argument("--model", default="gguf:gemma3-270m", help="the model of cases that name none")
    options = parser.parse_args(arguments)
    (case,) = (case for case in CASES if case.name == options.case)
    try:
        measure(dataclasses.replace(case, groups=((OURS, options.peer),), repetitions=2), options)
    except AgentArkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(case: Case, options: argparse.Namespace) -> None:
    tokenizer = resolve_model(options.model).resolve()
    model = tokenizer if case.model is None else random_model(case.model)
    pairs = draw(case.lengths, case.traces)
    sides = sides_of(case, load_config(model), pairs, model, tokenizer, peers=True)
    ways = [divided(sides[options.peer], way) for way in options.ways or ways_of(case.traces)]
    first: Reply | None = None
    for side in [sides[OURS], *ways]:
        with Worker(side) as worker:
            replies = [worker.repeat(index) for index in range(case.repetitions + 1)]
        first = first or replies[0]
        check = compare_losses({OURS: first, side.name: replies[0]}, loss_tokens(pairs))
        seconds = min(reply["seconds"] for reply in replies[1:])
        print(
            f"{side.name}: {sum(totals(pairs)) / seconds:.0f} tokens/s, {replies[-1]['peak_rss_gb']:.1f} GB, "
            f"loss differs by {check.value:.1g}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
