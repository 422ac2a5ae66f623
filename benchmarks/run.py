"""Runs the benchmarks, or prints their tables.

python -m benchmarks.run --suite cpu --peers          # everything, against transformers + torch and TRL: half an hour
python -m benchmarks.run --suite cpu --quick          # ours alone, fewer tokens
python -m benchmarks.run --suite gpu --peers          # on one GPU of 80 GB, random weights
python -m benchmarks.run --suite tpu_compile          # steps compiled for TPUs that are not there (extra `tpu`)
python -m benchmarks.run --table                      # Markdown from the result files
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from agentark_jax.errors import AgentArkError, UsageError
from benchmarks import (
    compile_time,
    debate,
    engine_client,
    generation,
    gpu_generation,
    gpu_sft,
    growth,
    grpo,
    overheads,
    peers,
    results,
    scaling,
    sft,
    sft_epoch,
    sft_memory,
    store,
)

CPU = (sft, sft_epoch, sft_memory, generation, debate, grpo, overheads, compile_time, growth)
SUITES = {
    "cpu": {module.NAME: module.run for module in CPU},
    "store": {store.NAME: store.run},
    "engine": {engine_client.NAME: engine_client.run},
    "gpu": {module.NAME: module.run for module in (gpu_sft, gpu_generation)},
    "tpu_compile": {scaling.NAME: scaling.run},
}
PEERS = {
    sft.NAME: ("trl", "tunix"),
    sft_epoch.NAME: ("trl", "tunix"),
    sft_memory.NAME: ("trl", "tunix"),
    generation.NAME: ("trl", "tunix"),
    debate.NAME: ("trl",),
    grpo.NAME: ("trl",),
    gpu_sft.NAME: ("trl",),
}  # by benchmark, the environments of `peers` that it needs; SGLang has one of its own
MODELLESS = {"gpu"}  # suites with random weights, that --model says nothing to
RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when all went well, 1 when a benchmark failed, 2 when it could not be run as asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu", help="for which hardware (default: cpu)")
    parser.add_argument("--only", metavar="NAME", help="one benchmark of the suite")
    parser.add_argument("--quick", action="store_true", help="two repetitions and fewer tokens; own result files")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also run those that we are compared with; make their environments first: python -m benchmarks.peers",
    )
    parser.add_argument("--model", default="gguf:gemma3-270m", help="a model directory in Hugging Face format")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where result files are (default: beside this)")
    parser.add_argument("--table", action="store_true", help="print the result files as Markdown and run nothing")
    options = parser.parse_args(arguments)
    try:
        if options.table:
            print_tables(options.suite, options.results, options.quick, options.only)
        else:
            run(options)
    except AgentArkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def chosen(suite: str, only: str | None) -> list[str]:
    """Names of the benchmarks to run, in order. Raises UsageError for a name that the suite does not have."""
    if only is not None and only not in SUITES[suite]:
        raise UsageError(f"--only: there is no {only!r} in the suite {suite}; choose among {', '.join(SUITES[suite])}")
    return [only] if only is not None else list(SUITES[suite])


def run(options: argparse.Namespace) -> None:
    """Runs the chosen benchmarks one after the other and writes each result as soon as it is there."""
    names = chosen(options.suite, options.only)
    if options.peers:
        for peer in sorted({peer for name in names for peer in PEERS.get(name, ())}):
            peers.python(peer)  # raises before anything is measured
    model, shown = (Path(), "") if options.suite in MODELLESS else resolved(options.model)
    started = time.monotonic()
    for name in names:

        def say(message: str, name: str = name) -> None:
            print(f"[{time.monotonic() - started:6.0f} s] {name}: {message}", file=sys.stderr, flush=True)

        for result in SUITES[options.suite][name](model, shown, quick=options.quick, peers=options.peers, say=say):
            say(f"wrote {results.write(result, options.results)}")
            print(results.table(result), flush=True)


def resolved(source: str) -> tuple[Path, str]:
    """A model's directory, and what it is called in results. Raises as `resolve_model`."""
    # Here, because tables need no model: this imports JAX.
    from agentark_jax.models.gguf import resolve_model

    model = resolve_model(source).resolve()
    # A directory's own name says which model it is without telling where it lies.
    return model, model.name if Path(source).expanduser().exists() else source


def print_tables(suite: str, directory: Path, quick: bool, only: str | None) -> None:
    """Prints the tables of all results that are there. Raises UsageError when there is none."""
    found = [path for name in chosen(suite, only) for path in results.paths_of(directory, name, quick)]
    if not found:
        raise UsageError(f"{directory}: no result files; run the benchmarks first, or give --results")
    print("\n".join(results.table(results.read(path)) for path in found), end="")


if __name__ == "__main__":
    sys.exit(main())
