"""The suites by name. `measure` makes figures of a bench and the suite's settings; `tables` shows them."""

from collections.abc import Mapping
from typing import Any, Protocol, cast

from rich.table import Table

from agentark_jax.suites import (
    accuracy,
    generalisation,
    quality,
    retention,
    robustness,
    self_correction,
    truthfulqa,
)
from agentark_jax.suites.bench import Bench


class Suite(Protocol):
    """A module."""

    def measure(self, bench: Bench, settings: Any) -> dict[str, Any]:
        """Figures as JSON values, each with its n and its interval; wall-clock times are not among them."""
        ...

    def tables(self, figures: Mapping[str, Any]) -> list[Table]:
        """The figures for a terminal of 80 columns."""
        ...


SUITES: Mapping[str, Suite] = {
    "accuracy": cast(Suite, accuracy),
    "self_correction": cast(Suite, self_correction),
    "robustness": cast(Suite, robustness),
    "truthfulqa": cast(Suite, truthfulqa),
    "generalisation": cast(Suite, generalisation),
    "retention": cast(Suite, retention),
    "quality": cast(Suite, quality),
}
