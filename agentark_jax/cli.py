"""The command line: `agentark run`, and tools for a single model.

Exit codes: 0 done, 1 something failed while running, 2 the request cannot be carried out as written, 130 interrupted.
"""

import argparse
import re
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.files import write_text

DESCRIPTION = """\
Distil multi-agent debate into one language model.

  questions ─► debate ─► traces ─► labels ─► selection ─► training ─► evaluation ─► report

A run does what is missing and reuses what is done; interrupt or kill it at any moment and start it again.
Results: <root>/<name>/report.html, results.json, model/ (Hugging Face format), traces.sqlite.

examples:
  agentark run --config configs/quickstart.yaml
  agentark run --config configs/quickstart.yaml --task.path my.jsonl --name mine
  agentark run --config configs/lab.yaml --seeds [0,1,2]
  agentark run --config configs/quickstart.yaml --fit.learning_rate 1e-5 --name slower
"""

DEBATE_DESCRIPTION = """\
Do what is missing of a run, up to and including the debate.

--shard I/N debates only the questions of worker I (from 0) of N, with the base that is in the run directory, into a
store of its own there, so that many workers debate at once on machines that see that directory. `agentark debate` or
`agentark run` then gathers what they said. A worker that was killed goes on where it was.

  agentark warm-start --config configs/lab.yaml
  agentark debate --config configs/lab.yaml --shard 0/2 &
  agentark debate --config configs/lab.yaml --shard 1/2 & wait
  agentark run --config configs/lab.yaml
"""

ATTRIBUTE_DESCRIPTION = """\
Do what is missing of a run, all of it, and say what the gain comes from: every arm beside the debate's student, and how
they differ. The same as `agentark run`.

--shard I/N makes only the students of worker I (from 0) of N, in a place of its own in the run directory, so that many
workers train and evaluate at once, on any machines that see that directory. What all arms are made from is made once,
by whoever comes first. `agentark attribute` without --shard then gathers what they made and does nothing again. A
worker that was killed goes on where it was.

--workers N does both: it starts N workers on this machine, each on its share of the cores, and gathers. Where
computations depend on the number of cores, as XLA's on CPUs do in the last digits, figures are those of so many cores.

  agentark attribute --config configs/attribution_lab.yaml
  agentark attribute --config configs/attribution_lab.yaml --workers 2
  agentark attribute --config configs/attribution_lab.yaml --shard 0/2 &
  agentark attribute --config configs/attribution_lab.yaml --shard 1/2 & wait
  agentark attribute --config configs/attribution_lab.yaml
"""

FIT_DESCRIPTION = """\
Do what is missing of a run, up to and including the training of the students; or, with --dry-run, print what that
training needs before a device is paid for: parameters, work, state and step memory per device.

TOPOLOGY is a TPU slice (v5e-16, v5p-8, v6e-8), GPUs
by number, kind and memory (8xH100-80GB), or CPU devices (cpu-8); none of them has to be here. TPU memory comes from the
TPU compiler (pip install 'agentark-jax[tpu]'), CPU memory from the CPU compiler, GPU memory from a model of the
activations. Neither weights nor data are read. Exit code 0: fits, 1: does not fit.

--training says which training is meant, if not that of the students: rl.fit (of a policy, with what stands beside it),
prm.frozen, prm.whole, warm_start.answer or warm_start.revision.

  agentark fit --config configs/qwen3_8b.yaml
  agentark fit --dry-run --topology v5e-16 --config configs/qwen3_8b.yaml
  agentark fit --dry-run --topology v5e-8 --config configs/qwen3_8b.yaml --fit.rows 8
  agentark fit --dry-run --training rl.fit --topology 8xH100-80GB --config configs/pad_qwen3_8b_gpu.yaml
"""

EVALUATE_DESCRIPTION = """\
Measure what one model can do on one task: any directory in Hugging Face format or hub id, whoever made it.

Suites: `accuracy` (one greedy answer, samples with their vote and pass@k, a debate and other methods on the same
questions), `self_correction` (what becomes of right and wrong answers under check prompts, of the model's own errors
and of others', planted or not), `robustness` (distractors, the order of choices, GSM-Plus), `truthfulqa` (MC1, MC2 and
free answers), `generalisation` (other tasks with free answers), `retention` (NLL and KL against the base on reasoning)
and `quality` (marks of judges). Results: <root>/<name>/results.json, what every stage found in a folder of its own,
traces.sqlite. What is done is reused; interrupt or kill it at any moment and start it again.

  agentark evaluate --model runs/quickstart/model --task.name gsm8k --task.path gsm8k/ --questions 200
  agentark evaluate --model Qwen/Qwen3-0.6B --task.name gsm8k --suites "[accuracy, self_correction]" --name qwen
  agentark evaluate --model DIR --engine.servers "[http://host:30000]" --accuracy.samples 16 --name dir
"""

REPORT_DESCRIPTION = """\
Write results.json, report.html and summary.md of a finished run again, from what its directory holds: configuration,
manifests, predictions and the trace store. Nothing is generated, trained or computed on a device; models and data may
be gone and the directory may have moved. Every file of a stage is checked against its manifest, and one that was
changed is named; what the trace store holds is checked by `agentark traces verify`.

  agentark report runs/quickstart
"""

SWEEP_DESCRIPTION = """\
Run every cell of a grid of configurations, each an ordinary run in <root>/<sweep>/<cell>, or make a table of what they
came to, in Markdown and CSV, beside them. The file has `base`, a list of configuration files; `common`, keys and values
that all cells have; `axes`, which give labels to keys and values; and maybe `only` and `leave_out`, filters such as
{teacher: qwen3_32b, agents: [a5, a10]}.

Cells that are done are left alone, one that fails does not stop the others. Options that are not the sweep's are those
of all its runs; where those or the file have changed since a cell was done, --update redoes what depends on it.

--shard I/N runs the cells of worker I (from 0) of N. --dry-run lists all cells, and whether they are done.
--table accuracy, or difference (paired, to the base), takes axes for --rows and --columns, `arm` among them, and
--where AXIS=LABEL,... for a part of the cells.

  agentark sweep --config configs/paper_grid.yaml --dry-run
  agentark sweep --config configs/paper_grid.yaml --shard 0/8
  agentark sweep --config configs/paper_grid.yaml --table accuracy --rows student,teacher,arm --columns test,train \\
      --where study=main
"""

RECIPES_DESCRIPTION = """\
Write the configurations that came with this package, such as quickstart.yaml and lab.yaml, to a directory, where they
can be read and changed. Where a file there differs from the recipe of its name, it is named and nothing is written.

  agentark recipes configs
  agentark run --config configs/lab.yaml
"""

USAGE = f"""\
usage: agentark <command> [options]

{DESCRIPTION}
commands:
  run        the whole pipeline (the same as `python -m agentark_jax.train`); `agentark run --help` lists every key
  warm-start, debate, select, fit
             the same up to and including that part; `debate --shard I/N` is one of N workers that share the questions,
             `fit --dry-run` says what the training needs on a named topology, and whether it fits there
  attribute  a whole run, by many workers where that is wanted: `--workers N` on this machine, or `--shard I/N` for
             worker I of N on any that see the run directory
  evaluate   any model on any task: accuracy, votes, debates, self-correction, with intervals
  report     results.json, report.html and summary.md of a finished run, from what its directory holds
  sweep      a grid of configurations: its runs, and tables of what they came to
  traces     a run's trace store: what was said and what it cost; export, merge, verify
  mirror     a copy of a run directory in object storage, from which a run goes on on another machine
  prm        process reward models: trained from published labels; steps scored and first errors found; how far sources
             of step labels agree
  logits     a model's logits for an array of token ids, to compare with any other implementation
  generate   a model's completions of a text
  recipes    the configurations that came with this package, written to a directory
"""


WARM_TRAININGS = ("warm_start.answer", "warm_start.revision")
PAD_TRAININGS = ("prm.frozen", "prm.whole", "rl.fit")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a command; the exit code. Errors are one message on standard error, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else UsageError.exit_code
    command, *rest = arguments
    try:
        _end_by_sigterm()
        if command == "run":
            return _run(rest, prog or "agentark run", DESCRIPTION)
        if command in ("warm-start", "select"):
            return _run(rest, f"agentark {command}", DESCRIPTION, until=command)
        if command == "debate":
            return _debate(rest)
        if command == "attribute":
            return _attribute(rest)
        if command == "fit":
            return _fit(rest)
        if command == "evaluate":
            return _evaluate(rest)
        if command == "report":
            return _report(rest)
        if command == "sweep":
            return _sweep(rest)
        if command == "recipes":
            return _recipes(rest)
        if command == "traces":
            from agentark_jax.traces_cli import traces

            return traces(rest)
        if command == "mirror":
            from agentark_jax.mirror import mirror

            return mirror(rest)
        if command == "prm":
            from agentark_jax.prm_cli import prm

            return prm(rest)
        if command in ("logits", "generate"):
            from agentark_jax import tools

            (tools.logits if command == "logits" else tools.generate)(rest)
            return 0
        raise UsageError(f"unknown command {command!r}. `agentark --help` lists the commands.")
    except AgentArkError as error:
        print(f"{'error' if error.exit_code == 1 else 'usage error'}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a full disk or a lost permission, wherever it strikes
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror}. Nothing that was finished is lost; run it again.", file=sys.stderr)
        return AgentArkError.exit_code
    except KeyboardInterrupt:
        print("interrupted: nothing is lost, run the same command again to continue.", file=sys.stderr)
        return 130


def _end_by_sigterm() -> None:
    """SIGTERM ends the command as an interrupt does: workers that it started end too, and locks are let go of."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _run(
    arguments: Sequence[str], prog: str, description: str, share: tuple[int, int] | None = None, **options: Any
) -> int:
    from agentark_jax import config

    resolved, update = config.parse(arguments, prog, description)
    if share is not None and update:
        raise UsageError("--update does not go with --shard: update the run first, with `agentark select`.")
    # Imported only now, so that --help and a mistyped key do not wait for JAX.
    from agentark_jax.training import distributed

    distributed.initialize()
    from agentark_jax.cache import enable_compilation_cache

    enable_compilation_cache()
    if distributed.follows():
        from agentark_jax.training.job import follow

        follow()
        return 0
    from agentark_jax import experiment, workers

    with distributed.leading():
        if share is None:
            experiment.run(resolved, update=update, **options)
        else:
            workers.make_share(resolved, *share)
    return 0


def _attribute(arguments: Sequence[str]) -> int:
    parser = _parser("agentark attribute")
    parser.add_argument("--shard")
    parser.add_argument("--workers", type=int)
    options, rest = _known(parser, arguments)
    told = rest, "agentark attribute", ATTRIBUTE_DESCRIPTION
    if options.shard is not None:
        if options.workers is not None:
            raise UsageError("--workers does not go with --shard: it starts workers that have their shards.")
        return _run(*told, share=_shard(options.shard))
    if options.workers is not None:
        if options.workers < 1:
            raise UsageError(f"--workers is {options.workers}: give how many, 1 or more.")
        from agentark_jax import config

        resolved, update = config.parse(*told)
        from agentark_jax import workers

        rest = [argument for argument in rest if argument != "--update"]
        workers.make_all(resolved, rest, options.workers, update=update)
    return _run(rest, *told[1:])


def _debate(arguments: Sequence[str]) -> int:
    parser = _parser("agentark debate")
    parser.add_argument("--shard")
    options, rest = _known(parser, arguments)
    if options.shard is None:
        return _run(rest, "agentark debate", DEBATE_DESCRIPTION, until="debate")
    from agentark_jax import config

    resolved, update = config.parse(rest, "agentark debate", DEBATE_DESCRIPTION)
    shard, shards = _shard(options.shard)
    if update:
        raise UsageError("--update does not go with --shard: update the run first, with `agentark warm-start`.")
    from agentark_jax.cache import enable_compilation_cache

    enable_compilation_cache()
    from agentark_jax import experiment

    experiment.debate_shard(resolved, shard, shards)
    return 0


def _shard(text: str) -> tuple[int, int]:
    """I/N as numbers."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise UsageError(f"--shard is {text!r}: give I/N, a worker from 0 to N - 1 and how many there are.")
    return int(found[1]), int(found[2])


def _fit(arguments: Sequence[str]) -> int:
    parser = _parser("agentark fit")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--topology")
    parser.add_argument("--training", choices=("fit", *PAD_TRAININGS, *WARM_TRAININGS), default="fit")
    options, rest = _known(parser, arguments)
    if not options.dry_run and options.topology is None:
        return _run(rest, "agentark fit", FIT_DESCRIPTION, until="fit")
    from agentark_jax import config

    resolved, _ = config.parse(rest, "agentark fit", FIT_DESCRIPTION)
    if not options.dry_run:
        raise UsageError("--topology is for --dry-run: training takes the devices that are here")
    if options.topology is None:
        raise UsageError("--topology is missing: name the devices, such as v5e-16, v5p-8, 8xH100-80GB or cpu-8")
    from agentark_jax import preflight
    from agentark_jax.models.published import describe

    where = preflight.topology(options.topology)
    fit, rl = attrgetter(options.training)(resolved), resolved.rl if options.training == "rl.fit" else None
    if fit is None:
        raise UsageError(f"{options.training} is null: there is no such training")
    source, model = resolved.model.source, describe(resolved.model)
    judge = model
    if resolved.prm.model is not None:
        judge = describe(replace(resolved.model, source=resolved.prm.model))
        if options.training in ("prm.frozen", "prm.whole"):
            source, model = resolved.prm.model, judge
    report = preflight.preflight(source, model, fit, where, rl, options.training, judge)
    print(preflight.table(report))
    return 0 if report.fits else 1


def _evaluate(arguments: Sequence[str]) -> int:
    from agentark_jax import config

    resolved, update = config.parse_evaluate(arguments, "agentark evaluate", EVALUATE_DESCRIPTION)
    from agentark_jax.cache import enable_compilation_cache

    enable_compilation_cache()
    from agentark_jax.evaluate import evaluate

    evaluate(resolved, update=update)
    return 0


def _report(arguments: Sequence[str]) -> int:
    parser = _parser("agentark report", REPORT_DESCRIPTION)
    parser.add_argument("directory", metavar="RUN_DIR", type=Path)
    options = _only(parser, arguments)
    from agentark_jax import experiment

    experiment.report(options.directory)
    return 0


def _sweep(arguments: Sequence[str]) -> int:
    parser = _parser("agentark sweep", SWEEP_DESCRIPTION)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--name")
    parser.add_argument("--root")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--shard", metavar="I/N", default="0/1")
    parser.add_argument("--table", choices=("accuracy", "difference"))
    parser.add_argument("--rows", metavar="AXIS,...", type=_listed, default=[])
    parser.add_argument("--columns", metavar="AXIS,...", type=_listed, default=[])
    parser.add_argument("--where", metavar="AXIS=LABEL,...", action="append", default=[])
    options, rest = _known(parser, arguments)
    from agentark_jax import sweep

    changes = {key: value for key in ("name", "root") if (value := getattr(options, key)) is not None}
    found = sweep.load_sweep(options.config, rest, **changes)
    where = {}
    for each in options.where:
        axis, equals, labels = each.partition("=")
        if not equals:
            raise UsageError(f"--where is {each!r}: give AXIS=LABEL, or several labels with commas between them.")
        where[axis] = _listed(labels)
    if options.dry_run:
        cells = list(found.grid.cells())
        for cell in cells:
            print(f"{found.state(cell):6} {cell.name}")
        print(f"{sum(found.state(cell) == 'done' for cell in cells)} of {len(cells)} cells are done.")
        return 0
    if options.table:
        print("\n".join(sweep.write_table(found, options.table, options.rows, options.columns, where)))
        return 0
    shard, shards = _shard(options.shard)
    failed = sweep.run_cells(found, shard, shards, partial(print, flush=True), sweep.run_process)
    if failed:
        raise AgentArkError(f"{len(failed)} cells failed, see above: {', '.join(failed)}. This command goes on.")
    return 0


def _recipes(arguments: Sequence[str]) -> int:
    parser = _parser("agentark recipes", RECIPES_DESCRIPTION)
    parser.add_argument("directory", metavar="DIR", type=Path)
    options = _only(parser, arguments)
    shipped = Path(__file__).with_name("configs").glob("*.yaml")
    recipes = {options.directory / recipe.name: recipe.read_text(encoding="utf-8") for recipe in sorted(shipped)}
    for path, text in recipes.items():
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            raise UsageError(f"{path} differs from the recipe of that name: choose another directory, or move it away.")
    for path, text in recipes.items():
        write_text(path, text)
    print(f"{len(recipes)} recipes are in {options.directory}.")
    return 0


def _listed(text: str) -> list[str]:
    return text.split(",")


def _parser(prog: str, description: str | None = None) -> argparse.ArgumentParser:
    """A parser for `_known`; without a description the parser of the configuration has the help."""
    return argparse.ArgumentParser(
        prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=description is not None,
        allow_abbrev=False,
        exit_on_error=False,
    )


def _known(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command that are no keys of the configuration, and all other arguments."""
    try:
        return parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}. `{parser.prog} --help` explains it.") from error


def _only(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command that takes no others."""
    options, rest = _known(parser, arguments)
    if rest:
        raise UsageError(f"unknown argument {rest[0]!r}. `{parser.prog} --help` explains what there is.")
    return options


if __name__ == "__main__":
    sys.exit(main())
