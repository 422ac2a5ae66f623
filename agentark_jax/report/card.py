"""The model card (README.md, Markdown) that goes with an exported model."""

from collections.abc import Mapping
from typing import Any

from agentark_jax.errors import AgentArkError
from agentark_jax.report import words
from agentark_jax.report.markdown import provenance, text


def model_card(results: Mapping[str, Any], arm: str) -> str:
    """Markdown with YAML front matter for the model of `arm`: origin, training data, results with intervals, limits.

    Raises AgentArkError when `results` has no such arm or another schema.
    """
    words.check(results)
    if arm not in results["arms"]:
        raise AgentArkError(f"results.json: no arm {arm!r}; there are {', '.join(sorted(results['arms']))}")
    run, model, task = results["run"], results["model"], results["task"]
    label = text(words.arm_label(results, arm))
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [agentark, distillation, multi-agent-debate]",
        "---",
        "",
        f"# {text(run['name'])}: {label}",
        "",
        text(results["arms"][arm].get("description") or ""),
        "",
        f"Made from {text(model['name'])} ({text(model['source'])}, {words.size(model['parameters'])} parameters) "
        "by distilling multi-agent debate into one model (AgentArk, arXiv 2602.03955).",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")',
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")',
        "```",
        "",
        *_training(results, arm),
        *_results(results, arm),
        "## Limits",
        "",
        f"Measured on the task {text(task['name'])} only; nothing is known about other tasks, languages or safety. "
        "The licence of the base model applies to these weights.",
        "",
        "## Provenance",
        "",
        *provenance(run),
        "",
    ]
    return "\n".join(lines)


def _training(results: Mapping[str, Any], arm: str) -> list[str]:
    training = (results.get("training") or {}).get(arm)
    if not training:
        return []
    return [
        "## Training",
        "",
        f"{training['examples']:,} examples, {training['steps']:,} steps, {training['tokens']:,} tokens "
        f"({training['loss_tokens']:,} of them with loss), final loss {words.number(training['final_loss'], 3)}.",
        "",
    ]


def _results(results: Mapping[str, Any], arm: str) -> list[str]:
    lines = ["## Results", "", "95 % intervals: Wilson for accuracies, paired for differences.", ""]
    lines += ["| arm | accuracy % | n | tokens per question | cost |", "|---|---:|---:|---:|---:|"]
    for name, row in results["arms"].items():
        label = text(words.arm_label(results, name))
        lines.append(
            f"| {f'**{label}**' if name == arm else label} "
            f"| {words.percent(row['accuracy'])} {text(words.interval(row['low'], row['high']))} | {row['n']:,} "
            f"| {words.number(row['tokens_per_question']['total'])} | {words.number(row['cost_ratio'], 2)}× |"
        )
    lines.append("")
    own = [item for item in results.get("differences") or [] if arm in (item["a"], item["b"])]
    lines += [f"- {text(item.get('sentence') or words.finding(results, item))}" for item in own]
    return [*lines, ""] if own else lines
