"""Writes PROJECTION.md: what the paper's method would cost at 10⁹ trace tokens on up to 256 chips.

python -m benchmarks.projection                       # from the result files beside this

No figure of it was measured at that size. Everything comes from result files (bytes in compiled programs, counts of
debates, the store's bytes, dry runs) and from the assumptions below, and says from which.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentark_jax.errors import AgentArkError
from agentark_jax.files import write_text
from agentark_jax.models.flops import sft_flops
from agentark_jax.models.published import describe
from agentark_jax.models.source import ModelSourceConfig
from agentark_jax.training.config import MeshConfig
from benchmarks import growth, results, scaling
from benchmarks.results import Comparison, Result
from benchmarks.scaling import LARGE, MIDDLE, SMALL, TOTAL

PAGE = Path(__file__).resolve().parent / "PROJECTION.md"
LAYOUTS = ("own_first", "shared_first")


@dataclass(frozen=True)
class Chip:
    """Figures of Google's public data sheets: bf16 FLOP/s, bytes/s that a chip sends over all its links, its links."""

    name: str
    peak: float
    sends: float
    links: int

    @property
    def ring(self) -> float:
        """Bytes/s that a chip sends when a collective goes round one axis of the torus, in both directions."""
        return self.sends / self.links * 2


CHIPS = {"v5e": Chip("v5e", 197e12, 200e9, 4), "v5p": Chip("v5p", 459e12, 600e9, 6)}


@dataclass(frozen=True)
class Assumptions:
    """What no result file says.

    Args:
        tokens: answers' tokens that are trained on, once.
        utilisation: shares of the peak that useful FLOPs reach (MFU), from a cautious one to a good one.
        chips: sizes of slices that hours are given for.
        chip: on which.
        kept: shares of all answers that become training examples: all, or one of a debate of 3 agents and 2 rounds.
    """

    tokens: float = 1e9
    utilisation: tuple[float, float] = (0.3, 0.5)
    chips: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    chip: Chip = field(default_factory=lambda: CHIPS["v5e"])
    models: tuple[str, ...] = (SMALL, MIDDLE, LARGE)
    kept: tuple[float, ...] = (1.0, 1 / 6)


@dataclass(frozen=True)
class Sources:
    """The result files that a projection is made from."""

    scaling: list[Comparison]
    debate: Comparison
    store: Result
    fits: list[Result]
    dry_runs: list[dict[str, Any]]

    @staticmethod
    def read(directory: Path) -> "Sources":
        """Raises AgentArkError when there are no scaling results, or no store.json or growth.debate.json."""
        compiled = [results.read(path) for path in results.paths_of(directory, scaling.NAME, False)]
        if not compiled:
            raise AgentArkError(
                f"{directory}: no {scaling.NAME}.*.json; run python -m benchmarks.run --suite tpu_compile"
            )
        debate = results.read(results.path_of(directory, f"{growth.NAME}.debate", False))
        store = results.read(results.path_of(directory, "store", False))
        fits = [results.read(path) for path in sorted(directory.glob("sft*.json")) if ".quick." not in path.name]
        if not isinstance(debate, Comparison) or not isinstance(store, Result):
            raise AgentArkError(
                f"{directory}: growth.debate.json or store.json is not what it should be; measure again"
            )
        dry = directory / "dry_runs.json"
        try:
            runs = json.loads(dry.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AgentArkError(f"{dry}: cannot be read ({error}); run python -m benchmarks.dry_runs") from error
        return Sources(
            [one for one in compiled if isinstance(one, Comparison)],
            debate,
            store,
            [one for one in fits if isinstance(one, Result)],
            runs,
        )


def page(given: Sources, assumed: Assumptions) -> str:
    """The whole text."""
    low, high = assumed.utilisation
    chip = assumed.chip
    sections = [
        "# A projection, not a measurement",
        f"What {assumed.tokens:.0e} tokens of debate traces would cost to make, keep and train on. Written by "
        "`python -m benchmarks.projection` from the result files in `benchmarks/results/` and from assumptions; no "
        "figure here was measured at this size.",
        "## Assumptions",
        "\n".join(
            [
                f"- A {chip.name} chip computes {chip.peak / 1e12:.0f} TFLOP/s in bf16 and sends "
                f"{chip.sends / 1e9:.0f} GB/s over {chip.links} links; a collective that goes round one axis uses two "
                f"of them, {chip.ring / 1e9:.0f} GB/s (Google's data sheets).",
                f"- Training reaches {low:.0%} to {high:.0%} of the peak in useful FLOPs (MFU): not measured, for want "
                "of a TPU.",
                "- One epoch. Each answer is trained with its question before it, as long as in `store.json`: "
                f"{_question(given)} tokens for {_answer(given)} of an answer. Rows are packed, "
                "and only answers have loss.",
                "- Useful FLOPs are counted (`agentark_jax/models/flops.py`), recomputation is not one of them.",
            ]
        ),
        "## Training",
        hours(given, assumed),
        "## Where communication dominates",
        communication(given, assumed),
        "## Making the traces",
        making(given, assumed),
        "## Keeping them",
        keeping(given, assumed),
    ]
    return "\n\n".join(sections) + "\n"


def _question(given: Sources) -> int:
    return given.store.sizes["question_tokens"]


def _answer(given: Sources) -> int:
    return given.store.sizes["completion_tokens"]


def flops_per_token(source: str, row_length: int, loss_share: float) -> float:
    """Useful FLOPs of a token in a full row, of whose tokens this share have loss."""
    model = describe(ModelSourceConfig(source))
    work = sft_flops(model, lengths=[row_length], loss_tokens=round(loss_share * row_length), train_head=True)
    return sum(work.values()) / row_length


def loss_share(given: Sources) -> float:
    """Share of the trained tokens that are an answer's."""
    return _answer(given) / (_answer(given) + _question(given))


def hours(given: Sources, assumed: Assumptions) -> str:
    """Hours of training by model and number of chips."""
    low, high = assumed.utilisation
    share, row = loss_share(given), scaling.Case.row_length
    trained = assumed.tokens / share
    lines = [
        f"Hours on so many {assumed.chip.name} chips, from {high:.0%} to {low:.0%} MFU, for {trained:.2e} tokens in "
        f"rows of {row}, of which {assumed.tokens:.0e} are answers'. A dash: not known to fit.",
        "",
        f"| model | FLOPs per token | {' | '.join(map(str, assumed.chips))} |",
        "|---" * (2 + len(assumed.chips)) + "|",
    ]
    for source in assumed.models:
        per_token = flops_per_token(source, row, share)
        cells = []
        for chips in assumed.chips:
            fast, slow = (trained * per_token / (chips * assumed.chip.peak * use) / 3600 for use in (high, low))
            cells.append(f"{_short(fast)} – {_short(slow)}" if fits(given, source, chips) else "–")
        lines.append(f"| {source} | {per_token / 1e9:.2f} G | {' | '.join(cells)} |")
    known = sorted(
        {
            f"{run['recipe']} on {run['topology']} ({run['step'] / run['memory']:.0%} of its memory)"
            for run in _dry(given)
            if run["fits"]
        }
    )
    lines += ["", f"Known to fit, by `dry_runs.json`, all parameters trained: {', '.join(known)}."]
    lines += [f"For scale, measured: {line}" for line in _measured(given, assumed)]
    return "\n".join(lines)


def _dry(given: Sources) -> Iterator[dict[str, Any]]:
    """Dry runs of whole models on v5e, by the compiler."""
    for run in given.dry_runs:
        if run["recipe"].startswith("qwen3_") and run["trained"] == "all parameters" and run["topology"][:4] == "v5e-":
            yield run


def fits(given: Sources, source: str, chips: int) -> bool:
    """Whether parameters and optimizer state, by `dry_runs.json`, divided over so many chips leave room for a step.

    Where the very slice was run, what the compiler found decides.
    """
    recipe = "qwen3_" + source.rsplit("-", 1)[-1].lower()
    runs = {int(run["topology"].split("-")[1]): run for run in _dry(given) if run["recipe"] == recipe}
    if chips in runs:
        return bool(runs[chips]["fits"])
    return any(run["fits"] and chips > known for known, run in runs.items())


def _measured(given: Sources, assumed: Assumptions) -> Iterator[str]:
    """What those tokens would take where a step was measured."""
    for one in given.fits:
        for row in one.rows:
            if row.name == "agentark_jax" and row.floor_fraction is not None:
                speed = row.tokens_per_second.median
                yield (
                    f"{one.model['name']} on {one.environment['cpu']} trains {speed:.0f} tokens/s "
                    f"(`{one.benchmark}.json`), {assumed.tokens / loss_share(given) / speed / 86400:.0f} days."
                )


def communication(given: Sources, assumed: Assumptions) -> str:
    """Bytes in compiled programs against the time that computing takes."""
    high = assumed.utilisation[1]
    lines = [
        "What a chip sends in a step, counted in the compiled program (`scaling.*.json`), at the speed of one axis; "
        f"beside it what the step's FLOPs take at {high:.0%} MFU. Without `tensor`, what is sent are weights and "
        "gradients, which do not grow with the rows: the last column is how many tokens a chip must have in a step for "
        "the two to be equal. With fewer, communication dominates; with more, it can hide behind the computation. What "
        "`tensor` sends are activations, which grow with the rows, so more of them do not help.",
        "",
        "| model | mesh | sent | of theory | sending | computing | tokens per chip, here → equal |",
        "|---|---|---|---|---|---|---|",
    ]
    order = {source: number for number, source in enumerate((SMALL, MIDDLE, LARGE))}
    for one in sorted(given.scaling, key=lambda one: (order.get(one.model["name"], 9), one.sizes["devices"])):
        chip = CHIPS[one.model["topology"].split("-")[0]]
        sizes = one.sizes
        sent = _value(one, TOTAL) * 1e9
        tokens = sizes["rows"] * sizes["row_length"] / sizes["devices"]
        per_token = flops_per_token(one.model["name"], sizes["row_length"], loss_share(given))
        sending, computing = sent / chip.ring, tokens * per_token / (chip.peak * high)
        equal = "–" if sizes["tensor"] > 1 else f"{tokens * sending / computing:,.0f}"
        mesh = " × ".join(f"{axis} {sizes[axis]}" for axis in vars(MeshConfig()) if sizes[axis] > 1)
        lines.append(
            f"| {one.model['name']} | {one.model['topology']}: {mesh} | {sent / 1e9:.2f} GB | "
            f"{sent / 1e9 / _value(one, scaling.THEORY + TOTAL):.2f}× | {sending * 1e3:.0f} ms | "
            f"{computing * 1e3:.0f} ms | {tokens:,.0f} → {equal} |"
        )
    return "\n".join(lines)


def making(given: Sources, assumed: Assumptions) -> str:
    """Calls and tokens of the debates that say that much."""
    found = {entry.name: entry.value.median for entry in given.debate.measured}
    sizes = given.debate.sizes
    lines = [
        f"Debates of {sizes['agents']} agents over {sizes['rounds']} rounds, an answer {_answer(given)} tokens "
        f"long. Prompt tokens are in the proportion of `{given.debate.benchmark}.json`, whose answers have "
        f"{sizes['completion_tokens']} tokens; new ones are those that no prefix cache could have.",
        "",
        "| answers kept | generated tokens | calls | questions | layout | prompt tokens | of them new |",
        "|---|---|---|---|---|---|---|",
    ]
    for kept in assumed.kept:
        generated = assumed.tokens / kept
        calls = generated / _answer(given)
        for layout in LAYOUTS:
            point = f"{layout}, {sizes['agents']} agents: "
            spoken = sizes["agents"] * sizes["rounds"] * sizes["questions"] * sizes["completion_tokens"]
            prompts, new = (found[point + words] / spoken * generated for words in (growth.PROMPTS, growth.NEW))
            lines.append(
                f"| {kept:.0%} | {generated:.1e} | {calls:.1e} | {calls / sizes['agents'] / sizes['rounds']:.1e} | "
                f"`{layout}` | {prompts:.1e} | {new:.1e} |"
            )
    return "\n".join(lines)


def keeping(given: Sources, assumed: Assumptions) -> str:
    """Bytes of the trace store."""
    each = store_bytes(given.store) / (given.store.sizes["turns"] * _answer(given))
    kept = ", ".join(f"{assumed.tokens / kept * each / 1e9:.0f} GB with {kept:.0%} kept" for kept in assumed.kept)
    return (
        f"A store of {given.store.sizes['turns']:,} turns takes {each:.1f} bytes for each token of an answer, prompts, "
        f"ids and log-probabilities included (`store.json`: its floor's share × the disk's rate × its time): {kept}."
    )


def store_bytes(store: Result) -> float:
    """The size of the finished store: what its floor is counted from, round by round the same."""
    row, disk = store.rows[0], store.rates["bandwidth"]
    assert row.floor_fraction is not None, "the store has a floor"
    rounds = zip(row.floor_fraction.values, row.tokens_per_second.values, disk.values, strict=True)
    return statistics.median(share * store.sizes["turns"] / speed * rate * 1e9 for share, speed, rate in rounds)


def _value(one: Comparison, name: str) -> float:
    return next(entry.value.median for entry in one.measured if entry.name == name)


def _short(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when the page is written, 1 when a result file is missing or damaged."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.projection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=PAGE.parent / "results", help="where the result files are")
    parser.add_argument("--page", type=Path, default=PAGE, help="what to write")
    options = parser.parse_args(arguments)
    try:
        write_text(options.page, page(Sources.read(options.results), Assumptions()))
    except AgentArkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(options.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
