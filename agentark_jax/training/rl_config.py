"""How a policy learns from what its own rollouts earn."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from agentark_jax.errors import require
from agentark_jax.objectives.config import Aggregation, PolicyLossConfig, Ratio, ValueLossConfig
from agentark_jax.training.alarms import AlarmConfig
from agentark_jax.training.config import FitConfig
from agentark_jax.training.reward_config import RewardConfig

Advantage = Literal["zscore", "mean", "leave_one_out", "pure", "papo", "gae"]
FaithfulTo = Literal["paper", "release"]

# What the two readings of AgentArk say where a key is null. The paper (§3, B.2) has group z-scores of what the PRM says
# of the whole output, one ratio for a whole output, and a KL in the loss; its released code PURE's rewards of steps
# beside the verifier's, whitened over the batch, and a KL in the reward.
_READINGS: dict[FaithfulTo, dict[str, Any]] = {
    "paper": {
        "rewards": RewardConfig({"process": 1.0}),
        "advantage": "zscore",
        "whiten": False,
        "aggregation": "sequence",
        "ratio": "sequence",
        "kl_loss": 0.01,
        "kl_reward": 0.0,
    },
    "release": {
        "rewards": RewardConfig({"process": 1.0, "verifiable": 1.0}),
        "advantage": "pure",
        "whiten": True,
        "aggregation": "sequence",
        "ratio": "token",
        "kl_loss": 0.0,
        "kl_reward": 0.001,
    },
}


@dataclass(frozen=True)
class RLConfig:
    """GRPO and its kin on fresh rollouts. Invalid values raise UsageError.

    Keys that are null are as `faithful_to` says: of `paper` rewards {process: 1}, advantage zscore, whiten false,
    aggregation sequence, ratio sequence, kl_loss 0.01, kl_reward 0; of `release` rewards {process: 1, verifiable: 1},
    advantage pure, whiten true, aggregation sequence, ratio token, kl_loss 0, kl_reward 0.001.

    Args:
        faithful_to: paper, AgentArk as it is written; release, as its code does it.
        iterations: batches of rollouts; after each the policy that samples is the one that was trained.
        questions: questions of an iteration, each of which is a group.
        group_size: rollouts of a question.
        updates: optimizer steps of one pass over an iteration's groups; `fit.epochs` says how many passes there are.
        temperature: at which rollouts are sampled, never truncated by top_p or top_k.
        rewards: what a rollout earns.
        advantage: zscore (GRPO), mean (Dr. GRPO) and leave_one_out (RLOO) compare whole rollouts of a group; pure gives
            steps what they earn in minimum form, less a token baseline (PURE); papo adds the process reward only among
            right answers; gae takes a learned value of each token for the baseline (PPO).
        correction_credit: wrong steps that the same rollout corrects, ending right, are neither paid for nor punished.
        whiten: bring an iteration's advantages to mean 0 and variance 1 over all tokens.
        dynamic_sampling: at most so many further batches of questions replace groups in which all earn the same (DAPO).
        mask_truncated: rollouts that were cut off at their limit, which are never right, teach nothing either.
        aggregation, ratio, clip_low, clip_high, rollout_cap: see `objectives.config.PolicyLossConfig`.
        kl_loss: factor of the KL divergence to the starting policy in the loss (k3).
        kl_reward: factor of the log-ratio to the starting policy that token rewards are less (k1).
        gae_lambda: λ of generalised advantage estimation, with advantage gae.
        value_loss: how values are learned, with advantage gae.
        alarms: when training is stopped because the policy hacks its rewards.
        fit: the optimizer, and how the policy is trained. `rows` of `row_length` tokens are a micro-batch, of which a
            step has as many as it needs; `checkpoint_every` counts iterations.
    """

    faithful_to: FaithfulTo = "paper"
    iterations: int = 40
    questions: int = 16
    group_size: int = 8
    updates: int = 1
    temperature: float = 1.0
    rewards: RewardConfig | None = None
    advantage: Advantage | None = None
    correction_credit: bool = False
    whiten: bool | None = None
    dynamic_sampling: int = 0
    mask_truncated: bool = False
    aggregation: Aggregation | None = None
    ratio: Ratio | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    rollout_cap: float | None = 2.0
    kl_loss: float | None = None
    kl_reward: float | None = None
    gae_lambda: float = 0.95
    value_loss: ValueLossConfig = field(default_factory=ValueLossConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    fit: FitConfig = field(default_factory=lambda: FitConfig(learning_rate=1e-6, schedule="constant"))

    def __post_init__(self) -> None:
        for key, choices in (("faithful_to", FaithfulTo), ("advantage", Advantage)):
            value, allowed = getattr(self, key), get_args(choices)
            require(
                value in allowed or (value is None and key == "advantage"), key, value, f"one of {', '.join(allowed)}"
            )
        for key in ("iterations", "questions", "group_size", "updates"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(self.dynamic_sampling >= 0, "dynamic_sampling", self.dynamic_sampling, "0 or more")
        require(
            self.dynamic_sampling == 0 or self.group_size >= 2,
            "dynamic_sampling",
            self.dynamic_sampling,
            "0 with a group_size of 1: no rollout earns anything else than its group",
        )
        require(
            0 < self.temperature < math.inf,
            "temperature",
            self.temperature,
            "a positive number: greedy teaches nothing",
        )
        for key in ("kl_loss", "kl_reward"):
            value = getattr(self, key)
            require(value is None or 0 <= value < math.inf, key, value, "zero or a positive number")
        require(0 <= self.gae_lambda <= 1, "gae_lambda", self.gae_lambda, "from 0 to 1")
        method = self.value("advantage")
        require(
            self.group_size >= 2 or method == "gae",
            "group_size",
            self.group_size,
            f"at least 2: the advantage {method} compares the rollouts of a group",
        )
        process = self.rewards_chosen.coefficients.get("process")
        require(
            bool(process) or method != "papo",
            "advantage",
            method,
            "zscore, which is the same without a coefficient for the reward process, or have one",
        )
        require(
            process is not None or not self.correction_credit,
            "correction_credit",
            self.correction_credit,
            "false without the reward process, whose model says which steps are wrong",
        )
        require(
            self.updates <= self.questions,
            "updates",
            self.updates,
            f"at most questions ({self.questions}): of whole groups",
        )
        require(self.fit.steps is None, "fit.steps", self.fit.steps, "null: iterations says how long the policy learns")
        require(self.fit.eval_every is None, "fit.eval_every", self.fit.eval_every, "null: rollouts are not validated")
        require(not self.fit.coefficients, "fit.coefficients", self.fit.coefficients, "empty: the loss is the policy's")
        self.loss(1)

    def value(self, key: str) -> Any:
        """A key's value, or where that is null what `faithful_to` says."""
        value = getattr(self, key)
        return _READINGS[self.faithful_to][key] if value is None else value

    def fingerprint(self) -> dict[str, Any]:
        """What of this config the policy depends on: everything but what its fit keeps and reports."""
        return {**asdict(self), "fit": self.fit.fingerprint()}

    @property
    def rewards_chosen(self) -> RewardConfig:
        chosen: RewardConfig = self.value("rewards")
        return chosen

    @property
    def on_policy(self) -> bool:
        """Whether each batch of rollouts makes one update, so that the policy that learns is the one that sampled."""
        return self.updates * self.fit.epochs == 1

    @property
    def steps(self) -> int:
        """Optimizer steps in all, if every iteration has something to learn from."""
        return self.iterations * self.updates * self.fit.epochs

    @property
    def needs_reference(self) -> bool:
        return bool(self.value("kl_loss") or self.value("kl_reward"))

    @property
    def needs_prm(self) -> bool:
        return "process" in self.rewards_chosen.coefficients

    def loss(self, max_tokens: int) -> PolicyLossConfig:
        """The policy loss for completions of at most so many tokens."""
        aggregation = self.value("aggregation")
        return PolicyLossConfig(
            aggregation=aggregation,
            max_tokens=max_tokens if aggregation == "constant" else None,
            ratio=self.value("ratio"),
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            rollout_cap=self.rollout_cap,
            kl_coefficient=self.value("kl_loss"),
            temperature=self.temperature,
            on_policy=self.on_policy,
        )


def verifiable_only(config: RLConfig) -> RLConfig:
    """The same without a process reward model: the verifier says what rollouts earn, compared within their groups."""
    kept = {name: value for name, value in config.rewards_chosen.coefficients.items() if name != "process"}
    kept["verifiable"] = kept.get("verifiable") or 1.0
    method = config.value("advantage")
    return replace(
        config,
        rewards=replace(config.rewards_chosen, coefficients=kept),
        advantage="zscore" if method in ("pure", "papo") else method,
        correction_credit=False,
    )
