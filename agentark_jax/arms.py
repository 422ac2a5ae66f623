"""The arms of a run: students beside the debate's own, each of which differs from it in what it learns from.

No difference between a debate's student and the base says that the debate was needed: it may come from more, or from
more correct, data. A control has what the debate's student has, but for one thing (AgentArk's referees ask for these).
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from agentark_jax.errors import UsageError
from agentark_jax.traces.config import Variant

STUDENT, CONTROL = "student", "control"
TWIN, PLANTED = "twin", "planted"  # what `evaluation.checks` is about
AFTER = "_after_"

Source = Literal[
    "debate",
    "verified",
    "debates",
    "samples",
    "self_refine",
    "other_peers",
    "hinted",
    "rationales",
    "answers",
    "rollouts",
    "student",
]


# What the variants of selection choose.
LEARNED: dict[Variant, str] = {
    "corrective_first": "the debate's last round, corrected answers first",
    "corrective_only": "answers that their agents corrected in the debate",
    "non_corrective_matched": "answers of agents that were right all along, matched to corrected ones",
    "final_only": "one last-round answer a question, the majority's",
    "consensus_only": "what more than half of the agents answered in the end, right or wrong",
    "all_correct": "correct answers of every round",
    "diverse_k1": "one last-round answer of questions where several agents were right",
    "diverse_k2": "two different last-round answers of questions where several agents were right",
    "diverse_k3": "three different last-round answers of questions where several agents were right",
    "round1_only": "correct round-1 answers",
    "dialogue": "last-round answers and all that they answer to, corrected ones first",
    "summary": "correct summaries of the last round",
    "majority": "last-round answers of the majority, right or wrong",
    "random": "last-round answers drawn at random, right or wrong",
}


@dataclass(frozen=True)
class Judged:
    """What a process reward model learned from: whose turns, and which labels of their steps.

    `labels`: those that the run's `prm.labels` gives; or `outcome`, the verifier's verdict on the whole answer at each
    of its steps (token-level verifiers, arXiv 2110.14168), a model that knows nothing of steps; or `random`, those of
    `prm.labels` dealt out at random among all the steps (`traces.step_labels.dealt`), a placebo.
    """

    turns: Literal["debate", "samples"] = "debate"
    labels: Literal["configured", "outcome", "random"] = "configured"

    @property
    def suffix(self) -> str:
        """What the names of its stages end with."""
        parts = (self.turns if self.turns != "debate" else "", self.labels if self.labels != "configured" else "")
        return "".join(f"_{part}" for part in parts if part)


@dataclass(frozen=True)
class Arm:
    """What one student learns from.

    Attributes:
        source: turns of the `debate`, or its last-round answers as `verified` by a model that is told no right answer;
            turns of as many `debates` of each question as a policy's rollouts would pay for, of independent `samples`
            of the agents, of a debate in which they hear nobody (`self_refine`) or what was said on other questions
            (`other_peers`), of agents that were told the right answer (`hinted`); or the task's own `rationales` or
            bare `answers` to the student's questions; or the student's own `rollouts`, from what they earn; or what the
            `student` learned, once more.
        variant: which turns (`traces.config`); None: those that the run's `select` says.
        matched: it has the student's questions, and of each as many trajectories, of as many tokens, as the student
            (`traces.matching`). Those are questions on which somebody was right, even where the variant asks no gold
            answer. An arm that is not matched learns from all its variant has, for as many steps as the student.
        budget: of the samples, of which there are as many as calls in a debate, only those that the debate's completion
            tokens on the question would have paid for.
        label: what reports call it.
        learns: what it learns from, in words.
        judged: what the process reward model that judges rollouts learned from; None: the verifier alone judges.
    """

    source: Source
    variant: Variant | None
    matched: bool
    label: str
    learns: str
    budget: bool = False
    judged: Judged | None = None

    @property
    def generated(self) -> bool:
        """Whether it learns from what agents said."""
        return self.source not in ("rationales", "answers", "rollouts", "student")

    @property
    def reinforced(self) -> bool:
        """Whether it learns from what its own rollouts earn."""
        return self.source == "rollouts"


CONTROLS = {
    CONTROL: Arm("debate", "round1_only", True, "single-agent student", "correct round-1 answers"),
    "samples": Arm("samples", "round1_only", True, "samples student", "correct independent samples"),
    "samples_budget": Arm(
        "samples",
        "round1_only",
        False,
        "samples student, equal generation budget",
        "all correct ones among independent samples, as many as a debate has calls, that the debate's tokens pay for",
        budget=True,
    ),
    "vote_filtered": Arm("samples", "majority", False, "voted samples student", "samples that agree with their vote"),
    "self_refine": Arm("self_refine", None, True, "self-refine student", "answers refined without peers"),
    "other_peers": Arm(
        "other_peers", None, True, "placebo student", "a debate in which peers' answers are of another question"
    ),
    "hinted": Arm("hinted", "round1_only", True, "hinted student", "solutions by agents that knew the right answer"),
    "gold": Arm("rationales", None, False, "gold student", "the task's own rationales"),
    "answer_only": Arm("answers", None, False, "answer-only student", "the right answers alone"),
    "student_budget": Arm(
        "debates",
        None,
        False,
        "debate student, generation budget of PAD",
        "as the student, of so many debates of each question as PAD has rollouts for",
    ),
    "majority": Arm("debate", "majority", True, "majority student", LEARNED["majority"]),
    "random": Arm("debate", "random", True, "random student", LEARNED["random"]),
    "verifier": Arm(
        "verified",
        "all_correct",
        True,
        "verifier-selected student",
        "last-round answers that the base, told no right answer, says are right",
    ),
}


# Process-aware distillation (PAD): a process reward model, then a policy that learns from what its rollouts earn. And
# what it is compared with: the same without the debate, without labels of steps, or without the model.
REINFORCED = {
    "pad": Arm(
        "rollouts",
        None,
        False,
        "PAD student",
        "what its rollouts earn, judged step by step by a model that learned from the debate",
        judged=Judged(),
    ),
    "pad_samples": Arm(
        "rollouts",
        None,
        False,
        "PAD student, single-agent judge",
        "what its rollouts earn, judged step by step by a model that learned from independent samples",
        judged=Judged("samples"),
    ),
    "pad_outcome": Arm(
        "rollouts",
        None,
        False,
        "PAD student, outcome judge",
        "what its rollouts earn, judged by a model that learned of the debate's answers whether they are right, not of "
        "their steps",
        judged=Judged(labels="outcome"),
    ),
    "pad_random": Arm(
        "rollouts",
        None,
        False,
        "PAD student, placebo judge",
        "what its rollouts earn, judged step by step by a model that learned the debate's labels dealt out at random",
        judged=Judged(labels="random"),
    ),
    "vr": Arm("rollouts", None, False, "verifier-only student", "which of its rollouts are right"),
}

# What they come to is known beforehand (`evaluation.checks`): they check how arms are trained and compared.
CHECKS = {
    TWIN: Arm(
        "student",
        None,
        False,
        "check: twin of the debate student",
        "the debate student's data once more, from another training seed: what differs is chance, no result",
    ),
    PLANTED: Arm(
        "student",
        None,
        False,
        "check: twin with planted right answers",
        "nothing: it is the twin, some of whose wrong answers were replaced by right ones, no result",
    ),
}

# By name: the controls, what any other variant selects of the debate, those that learn from rollouts, and checks.
ARMS: dict[str, Arm] = {
    **{variant: Arm("debate", variant, False, f"{variant} student", learns) for variant, learns in LEARNED.items()},
    **CONTROLS,
    **REINFORCED,
    **CHECKS,
}


def data_of(name: str) -> str:
    """Whose data an arm learns from: `diverse_k2` for `diverse_k2_after_student`."""
    return name.split(AFTER)[0]


def start_of(name: str) -> str | None:
    """From whose student an arm starts; None: from the base, as all others."""
    return name.split(AFTER)[1] if AFTER in name else None


def made_from(name: str) -> str | None:
    """Which other student must be there first: the one that it starts from, or whose answers it has."""
    return TWIN if name == PLANTED else start_of(name)


def label_of(name: str) -> str:
    """What reports call a student."""
    label = "debate student" if data_of(name) == STUDENT else ARMS[data_of(name)].label
    start = start_of(name)
    return label if start is None else f"{label} after {label_of(start)}"


def dealt(names: Sequence[str], workers: int) -> list[list[str]]:
    """What each of so many workers makes of the students of a run: they take turns, but what goes on from another
    student is made by whoever makes that."""
    shares: list[list[str]] = [[] for _ in range(workers)]
    for place, name in enumerate(names):
        start = made_from(name)
        mine = shares[place % workers] if start is None else next(share for share in shares if start in share)
        mine.append(name)
    return shares


def check_arms(names: list[str]) -> None:
    """Raises UsageError for names that stand for no arm, stand twice, or start from an arm that is not before them."""
    for place, name in enumerate(names):
        data, *start = name.split(AFTER)
        if (data != STUDENT and data not in ARMS) or len(start) > 1:
            near = difflib.get_close_matches(data, ARMS, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Choose among {', '.join(ARMS)}."
            raise UsageError(f"arms: there is no {name!r}. {hint}")
        if name in names[:place] or name == STUDENT:
            raise UsageError(f"arms: {name!r} is there already: name each arm once, and not the student.")
        if start and not {data, *start}.isdisjoint(CHECKS):
            raise UsageError(
                f"arms: {name!r}: {' and '.join(CHECKS)} are checks; nothing starts from another for them."
            )
        if name == PLANTED and TWIN not in names[:place]:
            raise UsageError(f"arms: {PLANTED!r} has the answers of {TWIN!r}, which must come before it.")
        if start and start[0] not in (STUDENT, *names[:place]):
            raise UsageError(f"arms: {name!r} starts from {start[0]!r}, which must come before it or be the student.")
