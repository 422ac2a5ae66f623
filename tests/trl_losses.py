"""What TRL's own GRPO loss and its gradients are on some tensors; writes `trl_losses.json` beside it.

`.peers/trl/bin/python tests/trl_losses.py`, which `python -m benchmarks.peers trl` makes. TRL computes everything but
log-probabilities: gradients are taken of these.
"""

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TABLE = Path(__file__).with_suffix(".json")
MAX_TOKENS, SHAPE = 9, (4, 7)
LENGTHS = [7, 3, 5, 1]
PLAIN = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "beta": 0.0,
    "cap": None,
}
CASES: list[dict[str, Any]] = [
    PLAIN,
    {**PLAIN, "per_token_advantages": True, "epsilon_high": 0.28},
    {**PLAIN, "beta": 0.3},
    {**PLAIN, "loss_type": "dapo", "epsilon_high": 0.28, "cap": 1.2},
    {**PLAIN, "loss_type": "dr_grpo", "beta": 0.1, "cap": 1.1},
    {**PLAIN, "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.05},
    {**PLAIN, "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.05, "beta": 0.2},
]


def computed(case: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """Loss, gradient and metrics of TRL's `GRPOTrainer` for one case."""
    import torch
    from trl import GRPOTrainer

    logprobs = tensors["logprobs"].clone().requires_grad_(True)
    metrics: Any = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros(SHAPE), None),
        **{key: case[key] for key in ("loss_type", "importance_sampling_level", "epsilon_low", "epsilon_high", "beta")},
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, **_: x, gather=lambda x: x),
        model=SimpleNamespace(training=True),
        use_vllm=case["cap"] is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_TOKENS,
        aux_loss_enabled=False,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        _entropy_bonus_enabled=False,
        _metrics=metrics,
    )
    ids = torch.zeros(SHAPE, dtype=torch.long)
    mask = tensors["mask"]
    weights = torch.exp((tensors["old"] - tensors["rollout"]) * mask)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": tensors["token_advantages" if case.get("per_token_advantages") else "advantages"],
        "old_per_token_logps": tensors["old"],
        "ref_per_token_logps": tensors["reference"],
        "importance_sampling_ratio": torch.clamp(weights, max=case["cap"]) if case["cap"] else None,
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    assert logprobs.grad is not None
    return {
        "case": case,
        "loss": loss.item(),
        "gradient": logprobs.grad.tolist(),
        "metrics": {name: values[0] for name, values in metrics["train"].items()},
    }


def main() -> None:
    import torch
    from trl.rewards import get_soft_overlong_punishment

    torch.manual_seed(0)
    logprobs = -torch.rand(SHAPE) * 3
    tensors = {
        "logprobs": logprobs,
        "old": logprobs + 0.5 * torch.randn(SHAPE),
        "reference": logprobs + 0.5 * torch.randn(SHAPE),
        "advantages": torch.randn(SHAPE[0]),
        "token_advantages": torch.randn(SHAPE),
        "mask": (torch.arange(SHAPE[1]) < torch.tensor(LENGTHS)[:, None]).long(),
    }
    tensors["rollout"] = tensors["old"] + 0.2 * torch.randn(SHAPE)
    lengths = [0, 6, 7, 8, 9, 10, 11]
    found = {
        "versions": {name: version(name) for name in ("trl", "torch")},
        "max_tokens": MAX_TOKENS,
        "tensors": {name: tensor.tolist() for name, tensor in tensors.items()},
        "losses": [computed(case, tensors) for case in CASES],
        "overlong": {
            "max_tokens": 10,
            "buffer": 4,
            "lengths": lengths,
            "penalties": get_soft_overlong_punishment(10, 4)([[0] * length for length in lengths]),
        },
    }
    TABLE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
