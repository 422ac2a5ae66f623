"""The command line: `agentark run`, and tools for a single model.

Exit codes: 0 done, 1 something failed while running, 2 the request cannot be carried out as written, 130 interrupted.
"""

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

USAGE = f"""\
usage: agentark <command> [options]

{DESCRIPTION}
commands:
  run        the whole pipeline (the same as `python -m agentark_jax.train`); `agentark run --help` lists every key
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
    from agentark_jax import experiment

    experiment.run(resolved, update=update)
    return 0


if __name__ == "__main__":
    sys.exit(main())
