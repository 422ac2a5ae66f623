"""Settings of the suites about robustness, truthfulness, generalisation, retention and the quality of reasoning."""

from dataclasses import dataclass, field

from agentark_jax.errors import UsageError
from agentark_jax.tasks.datasets import DATASETS

HUB = "hub"


@dataclass(frozen=True)
class RobustnessConfig:
    """Whether answers depend on what should not matter.

    Attributes:
        distractors: whether each question is asked again with a sentence that does not belong there.
        orders: in how many orders of its choices each question is asked again, where it has any; as many as there are
            choices balance the positions. 0 leaves this out.
        gsm_plus: the file or directory of GSM-Plus, or `hub`; null leaves it out.
        gsm_plus_seeds: how many of its seed questions are asked, each with all of its perturbations; 0 means all.
    """

    distractors: bool = True
    orders: int = 4
    gsm_plus: str | None = None
    gsm_plus_seeds: int = 100

    def __post_init__(self) -> None:
        _check_count("robustness.orders", self.orders)
        _check_count("robustness.gsm_plus_seeds", self.gsm_plus_seeds)
        if self.gsm_plus == "":
            raise UsageError("robustness.gsm_plus is empty: give a file or directory, hub, or null.")


@dataclass(frozen=True)
class TruthfulQAConfig:
    """TruthfulQA: which answers a model finds likely, and what it says.

    Attributes:
        path: the directory of its files (mc_task and TruthfulQA, .json or .jsonl); null: from the hub.
        questions: how many; 0 means all.
        choices: whether MC1 and MC2 are measured, which needs log-probabilities.
        answers: whether free answers are compared with true and false references.
    """

    path: str | None = None
    questions: int = 0
    choices: bool = True
    answers: bool = True

    def __post_init__(self) -> None:
        _check_count("truthfulqa.questions", self.questions)
        if not (self.choices or self.answers):
            raise UsageError(
                "truthfulqa.choices and truthfulqa.answers are both false: set one of them, or leave the suite out."
            )


@dataclass(frozen=True)
class ElsewhereConfig:
    """A dataset with free answers that a model was not made for.

    Attributes:
        name: its name, such as hotpotqa, qasper, qasper_leval or qmsum.
        path: its file or directory; null: from the hub.
        questions: how many of its held-out questions.
    """

    name: str
    path: str | None = None
    questions: int = 100

    def __post_init__(self) -> None:
        known = [name for name, dataset in DATASETS.items() if dataset.grader == "short"]
        if self.name not in known:
            raise UsageError(f"generalisation.tasks has the name {self.name!r}: use some of {', '.join(known)}.")
        if self.questions < 1:
            raise UsageError(f"generalisation.tasks, {self.name}: questions is {self.questions}: give at least one.")


@dataclass(frozen=True)
class GeneralisationConfig:
    """Questions of another kind, whose answers are free.

    Attributes:
        tasks: which; at least one where the suite is named.
        bertscore: a model that BERTScore is computed with too, as a directory or a hub id; null: none.
        bertscore_layer: whose embeddings count, from 1; null: as in `agentark traces audit`.
    """

    tasks: list[ElsewhereConfig] = field(default_factory=list)
    bertscore: str | None = None
    bertscore_layer: int | None = None

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise UsageError(f"generalisation.tasks names {', '.join(names)}: name each once.")


@dataclass(frozen=True)
class RetentionConfig:
    """What is kept of the model that this one was made from.

    Attributes:
        base: that model: a directory in Hugging Face format or a hub id. It must have the same tokenizer.
        questions: on the gold rationales of how many questions; 0 means all.
    """

    base: str | None = None
    questions: int = 0

    def __post_init__(self) -> None:
        _check_count("retention.questions", self.questions)


@dataclass(frozen=True)
class JudgeConfig:
    """A model that gives marks.

    Attributes:
        model: a directory in Hugging Face format or a hub id.
        servers: addresses of SGLang servers that have it; none: it runs in this process.
    """

    model: str
    servers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class QualityConfig:
    """How well answers reason, by the marks of judges.

    Attributes:
        judges: one or two of them, where the suite is named.
        questions: the answers to how many questions are judged; 0 means all.
    """

    judges: list[JudgeConfig] = field(default_factory=list)
    questions: int = 100

    def __post_init__(self) -> None:
        _check_count("quality.questions", self.questions)
        if len(self.judges) > 2:
            raise UsageError(f"quality.judges are {len(self.judges)}: give one or two.")


def _check_count(key: str, value: int) -> None:
    if value < 0:
        raise UsageError(f"{key} is {value}: give a number, or 0.")
