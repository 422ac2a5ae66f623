"""The command line: `agentark run`, and tools for a single model.

Exit codes: 0 done, 1 something failed while running, 2 the request cannot be carried out as written, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence

from agentark_jax.errors import AgentArkError, UsageError

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

FIT_DESCRIPTION = """\
Print what the training of `fit` needs, before a device is paid for: parameters, work, state and step memory per device.

--dry-run is required: training itself is a part of `agentark run`. TOPOLOGY is a TPU slice (v5e-16, v5p-8, v6e-8), GPUs
by number, kind and memory (8xH100-80GB), or CPU devices (cpu-8); none of them has to be here. TPU memory comes from the
TPU compiler (pip install 'agentark-jax[tpu]'), CPU memory from the CPU compiler, GPU memory from a model of the
activations. Neither weights nor data are read. Exit code 0: fits, 1: does not fit.

  agentark fit --dry-run --topology v5e-16 --config configs/qwen3_8b.yaml
  agentark fit --dry-run --topology v5e-8 --config configs/qwen3_8b.yaml --fit.rows 8
"""

USAGE = f"""\
usage: agentark <command> [options]

{DESCRIPTION}
commands:
  run        the whole pipeline (the same as `python -m agentark_jax.train`); `agentark run --help` lists every key
  fit        with --dry-run: what the training of a config needs on a named topology, and whether it fits there
  traces     a run's trace store: what was said and what it cost; export, merge, verify
  logits     a model's logits for an array of token ids, to compare with any other implementation
  generate   a model's completions of a text
"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a command; the exit code. Errors are one message on standard error, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else UsageError.exit_code
    command, *rest = arguments
    try:
        if command == "run":
            return _run(rest, prog or "agentark run")
        if command == "fit":
            return _fit(rest)
        if command == "traces":
            from agentark_jax.traces_cli import traces

            return traces(rest)
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


def _run(arguments: Sequence[str], prog: str) -> int:
    from agentark_jax import config

    resolved, update = config.parse(arguments, prog, DESCRIPTION)
    # Imported only now, so that --help and a mistyped key do not wait for JAX.
    from agentark_jax.training import distributed

    distributed.initialize()
    from agentark_jax.cache import enable_compilation_cache

    enable_compilation_cache()
    if distributed.follows():
        from agentark_jax.training.job import follow

        follow()
        return 0
    from agentark_jax import experiment

    with distributed.leading():
        experiment.run(resolved, update=update)
    return 0


def _fit(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("agentark fit", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--topology")
    try:
        options, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}. `agentark fit --help` explains it.") from error
    from agentark_jax import config

    resolved, _ = config.parse(rest, "agentark fit", FIT_DESCRIPTION)
    if not options.dry_run:
        raise UsageError("training runs through `agentark run`; `agentark fit` is for --dry-run --topology NAME only")
    if options.topology is None:
        raise UsageError("--topology is missing: name the devices, such as v5e-16, v5p-8, 8xH100-80GB or cpu-8")
    from agentark_jax import preflight
    from agentark_jax.models.published import describe

    where = preflight.topology(options.topology)
    report = preflight.preflight(resolved.model.source, describe(resolved.model), resolved.fit, where)
    print(preflight.table(report))
    return 0 if report.fits else 1


if __name__ == "__main__":
    sys.exit(main())
