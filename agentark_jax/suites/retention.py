"""What a model keeps of the one it was made from, on the reasoning of the task's gold rationales."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.table import Table

from agentark_jax.cast import find_model
from agentark_jax.errors import UsageError, memory_for
from agentark_jax.evaluation.retention import (
    Span,
    Tokens,
    reasoning_spans,
    retention_figures,
    span_states,
)
from agentark_jax.evaluation.suite_config import RetentionConfig
from agentark_jax.generation import Model
from agentark_jax.models.transformer import unembedding
from agentark_jax.models.weights import load_params
from agentark_jax.objectives.divergence import Readout, divergences
from agentark_jax.records import stable_hash
from agentark_jax.report import words
from agentark_jax.stages import Work
from agentark_jax.suites import tabled
from agentark_jax.suites.bench import Bench
from agentark_jax.training.job import release_memory

_TOKENS = "tokens.npz"


def measure(bench: Bench, settings: RetentionConfig) -> dict[str, Any]:
    """Figures of the reasoning tokens of gold rationales: NLL, perplexity, KL(base‖model) and KL(model‖base).

    `without_reasons` are questions whose rationale is none, `too_long` those that one of the models cannot take.

    Raises:
        UsageError: the base has another tokenizer, prompt format or vocabulary, or no rationale gives a reason.
    """
    assert settings.base is not None, "the configuration is checked"
    base = _find_base(bench, settings.base)
    asked = bench.questions[: settings.questions or len(bench.questions)]
    found = reasoning_spans(asked, bench.form)
    limit = min(bench.model.config.max_positions, base.config.max_positions)
    spans = [span for span in found if len(span.ids) <= limit]
    if not spans:
        raise UsageError(
            f"suites: retention reads gold rationales, but of {len(asked)} questions none has one with a reason in it "
            f"that fits {limit} tokens: take a task with worked solutions, such as gsm8k or math."
        )

    def build(work: Work) -> None:
        bench.generation.release()
        np.savez(work.directory / _TOKENS, **vars(_compared(base, bench.model, spans)))
        work.tokens = 2 * sum(len(span.ids) for span in spans)

    config = {"rationales": stable_hash([question.rationale for question in asked])}
    manifest = bench.measure("retention", build, version=1, config=config, inputs={"base": base.revision})
    with np.load(manifest.directory / _TOKENS) as kept:
        tokens = Tokens(**{key: kept[key] for key in kept})
    return {
        **retention_figures(tokens, [span.question_id for span in spans], level=bench.level),
        "base": settings.base,
        "without_reasons": len(asked) - len(found),
        "too_long": len(found) - len(spans),
    }


def _find_base(bench: Bench, source: str) -> Model:
    base, _ = find_model(source, bench.config.prompt)
    for what, theirs, ours in (
        ("tokenizer", base.form.tokenizer.hash, bench.form.tokenizer.hash),
        ("prompts", base.form.hash, bench.form.hash),
        ("number of tokens", base.config.vocab_size, bench.model.config.vocab_size),
    ):
        if theirs != ours:
            raise UsageError(
                f"retention.base: {source} has another {what} ({theirs}) than {bench.config.model} ({ours}), so that "
                "their tokens cannot be compared one by one: give the model that this one was trained from."
            )
    return base


@memory_for("retention", "Lower retention.questions, or leave retention out of suites")
def _compared(base: Model, model: Model, spans: list[Span]) -> Tokens:
    """Only one model's parameters are there at a time: of the other its hidden states and its head are left."""
    states, readouts = [], []
    for each in (base, model):
        params = load_params(each.directory, each.config)
        states.append(span_states(each.config, params, spans))
        readouts.append(Readout(unembedding(each.config, params), each.config.final_softcap))
        del params
        release_memory()
    targets = jnp.asarray(np.concatenate([span.targets for span in spans]))
    first_states, second_states = map(jnp.asarray, states)
    found = divergences((first_states, second_states), (readouts[0], readouts[1]), targets)
    sample = np.repeat(np.arange(len(spans)), [len(span.targets) for span in spans])
    first, second, forward, reverse = map(np.asarray, found)
    return Tokens(sample, -first, -second, forward, reverse)


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """NLL and perplexity of both models, and the divergences."""
    made = []
    for key, title in (("by_sample", "per sample, then averaged"), ("by_token", "by token")):
        found = figures[key]
        rows = [
            (name, *(tabled.number(found[measure][each]) for each in ("base", "model", "difference")))
            for measure, name in (("nll", "NLL, nats"), ("perplexity", "perplexity"))
        ]
        made.append(tabled.table(f"reasoning tokens, {title}", ("", "base", "model", "model − base"), rows))
        kl = [tabled.number(found[name], 4) for name in ("forward_kl", "reverse_kl")]
        counts = [words.number(figures[name]) for name in ("n", "tokens")]
        columns = ("KL(base‖model), nats", "KL(model‖base), nats", "n", "tokens")
        made.append(tabled.table("", columns, [(*kl, *counts)]))
    return made
