"""Compares pairs of LaTeX answers with math-verify, a line of JSON each; run by `workers` as a process of its own.

Formulas that models wrote can keep a computer algebra system busy for ever, or ask for all memory there is. So pairs
are compared in a child of this process, which an alarm that nobody catches ends; memory beyond a limit is refused. The
next child is a fork of this process, which has loaded all that is needed, and is there at once.

In: [gold, answer, seconds]. Out: {"equal": bool, "answer": one spelling of the answer's value, or null where it is none
that can be calculated with}, {"problem": str}, or {"killed": true} where the alarm rang.
"""

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

MEMORY = 2 * 1024**3  # bytes of address space
# Decimals of the numerical comparison where a symbolic one comes to nothing: 0.333333 is not 1/3.
DECIMALS = 12
DIGITS = 30


def compare(gold: str, answer: str) -> dict[str, Any]:
    from math_verify import LatexExtractionConfig, parse, verify

    def value_of(text: str) -> list[Any]:
        # The library's own limits are alarms; ours, which cannot be missed, would be cancelled by them.
        return list(parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None, raise_on_error=True))

    parsed = value_of(answer)
    # Gold first: the other way round, other pairs are equal.
    equal = gold == answer or verify(
        value_of(gold),
        parsed,
        float_rounding=DECIMALS,
        numeric_precision=DIGITS,
        timeout_seconds=None,
        raise_on_error=True,
    )
    value = parsed[0] if parsed else None
    return {"equal": bool(equal), "answer": None if value is None or isinstance(value, str) else spelling(value)}


def spelling(value: Any) -> str:
    """The same for values that expanding, evaluating and rationalising make the same."""
    import sympy

    if isinstance(value, sympy.Expr):
        value = sympy.nsimplify(sympy.radsimp(sympy.expand(value.doit())), rational=True)
    elif isinstance(value, sympy.FiniteSet | sympy.Tuple | sympy.Interval):
        parts = [spelling(part) for part in value.args]
        ordered = sorted(parts) if isinstance(value, sympy.FiniteSet) else parts
        return f"{type(value).__name__}({', '.join(ordered)})"
    return str(value)


def main() -> None:
    # Parsers print; the answers go where nothing else does.
    answers = os.dup(1)
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    compare("1", "x+1")  # loads what is loaded late
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    parent = os.getpid()
    try:
        os.write(answers, b"ready\n")
        while (child := os.fork()) != 0:
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                return
            os.write(answers, b'{"killed": true}\n')
        serve(parent, answers)
    except BrokenPipeError:
        return  # nobody asks any more


def serve(parent: int, answers: int) -> None:
    """Compares until the input ends, or the parent has."""
    for line in sys.stdin:
        if os.getppid() != parent:
            return
        gold, answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            reply = compare(gold, answer)
        except Exception as error:  # whatever a parser or sympy makes of hostile input is a verdict, not our failure
            reply = {"problem": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(answers, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
