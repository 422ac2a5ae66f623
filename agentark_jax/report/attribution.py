"""What made the difference, from the `attribution` of results.json: matched arms, contrasts, break-even."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from agentark_jax.report import words
from agentark_jax.report.sheets import of_records

KINDS = {
    "base": "Where all of them start",
    "no debate": "Learns without a debate",
    "debate": "Learns from a debate",
    "rewards": "Learns from rewards of its own rollouts",
    "check": "Checks of the comparison itself: no results",
}


def attribution(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The section's content: arms by kind, contrasts, matching in words, break-even, downloads; None without arms."""
    found = results.get("attribution")
    if not found:
        return None
    return {
        "groups": _groups(found["arms"]),
        "contrasts": found["contrasts"],
        "scale": scale(found["contrasts"]),
        "break_even": found["break_even"],
        "conclusion": found["conclusion"],
        "matching": [
            f"Seed {seed}: {_matching(results, each)}"
            for seed, each in zip(results["run"]["seeds"], found.get("matching") or [], strict=False)
            if each
        ],
        "sheets": {
            "arms": of_records("attribution-arms", found["arms"]),
            "contrasts": of_records("attribution-contrasts", found["contrasts"]),
            "break_even": of_records("break-even", found["break_even"]),
        },
    }


def scale(differences: Sequence[Mapping[str, Any]]) -> float:
    """Half the width of the differences' common axis: round, and as long as intervals and seeds reach.

    A fifth of the differences may lie beyond, where they reach thrice as far as the others: one arm that fails would
    else make dots of all the rest.
    """
    reaches = sorted(
        max((abs(end) for end in (item["low"], item["high"], *item.get("per_seed", [])) if words.known(end)), default=0)
        for item in differences
    ) or [0]
    most, furthest = reaches[math.ceil(0.8 * len(reaches)) - 1], reaches[-1]
    furthest = most if furthest > 3 * most > 0 else furthest
    return next(width for width in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0) if furthest <= width or width == 1.0)


def _groups(arms: list[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """(What the kind is called, its arms) in the order of `KINDS`, then kinds that this version does not know."""
    kinds = dict.fromkeys([*KINDS, *(arm["kind"] for arm in arms)])
    groups = [(KINDS.get(kind, kind), [arm for arm in arms if arm["kind"] == kind]) for kind in kinds]
    return [group for group in groups if group[1]]


def _matching(results: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    tokens = found["tokens"]
    names = ", ".join(f"“{words.arm_label(results, arm)}” {words.number(count)}" for arm, count in tokens.items())
    worst = min((each["p"] for each in found["lengths"].values()), default=None)
    alike = f" and of lengths alike (smallest p = {words.number(worst, 2)})" if words.known(worst) else ""
    dropped = sum(found["dropped"].values())
    return (
        f"the matched arms learn from the same {words.plural(found['questions'], 'question')} "
        f"({words.number(dropped)} given up), of equally many tokens{alike}: {names}."
    )
