"""One run's configuration: the rooms' dataclasses composed, read from YAML and dotted command-line overrides."""

import difflib
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from agentark_jax.arms import ARMS, CONTROL, PLANTED, STUDENT, check_arms, data_of
from agentark_jax.data.config import PromptConfig
from agentark_jax.data.weighting import ANSWER, COMPLETION, REASONING
from agentark_jax.engines import config as engines
from agentark_jax.engines.config import EngineConfig
from agentark_jax.errors import UsageError, redacted
from agentark_jax.evaluation.config import (
    SUITES,
    AccuracyConfig,
    EvaluationConfig,
    SelfCorrectionConfig,
    check_size,
)
from agentark_jax.evaluation.suite_config import (
    GeneralisationConfig,
    QualityConfig,
    RetentionConfig,
    RobustnessConfig,
    TruthfulQAConfig,
)
from agentark_jax.models.config import Lora
from agentark_jax.models.source import ModelSourceConfig
from agentark_jax.protocols.config import AgentConfig, Api, DebateConfig
from agentark_jax.protocols.methods import MethodsConfig
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.traces.config import SelectionConfig
from agentark_jax.training import config as training
from agentark_jax.training.config import FitConfig, MeshConfig
from agentark_jax.training.prm_config import PRMConfig
from agentark_jax.training.rl_config import RLConfig

T = TypeVar("T")
WORD = re.compile(r"[A-Za-z0-9][\w.-]*")  # what may name a folder

FITS = ("warm_start.answer", "warm_start.revision", "fit")
# Those of process-aware distillation, which a run needs if it has such an arm.
PAD_FITS = ("prm.frozen", "prm.whole", "rl.fit")

# What is wrong with these is told by the name that their owner gives them.
_NAMED_BY_THEIR_OWNERS = (MeshConfig, Lora)

# Keys, and groups of them, on which no result depends: a run directory takes them as they come.
FREE = (
    "root",
    "name",
    *(f"{fit}.{key}" for fit in (*FITS, *PAD_FITS) for key in training.BOOKKEEPING),
    *(f"engine.{key}" for key in engines.BOOKKEEPING),
    "team.servers",
    "suites",
)


@dataclass(frozen=True)
class QuestionCounts:
    """How many questions each split gets; the splits are disjoint.

    Attributes:
        warm_start: questions with gold rationales that teach the base model the answer format.
        validation: questions on which early stopping is judged; 0 where no stage stops early.
        debate: questions the agents debate; what they say is the training data.
        held_out: questions every arm is evaluated on.
    """

    warm_start: int = 160
    validation: int = 0
    debate: int = 48
    held_out: int = 96

    def __post_init__(self) -> None:
        for split, count in asdict(self).items():
            if count < 0 or (count == 0 and split != "validation"):
                raise UsageError(f"questions.{split} is {count}: give a positive number of questions.")


@dataclass(frozen=True)
class WarmStartConfig:
    """The short supervised training that turns a raw model into the base every arm starts from.

    It has two phases: question → gold rationale, then, on fresh questions, the later-round format as well (question
    and the model's own sampled answers, right and wrong → gold rationale).

    Attributes:
        revision_share: share of the warm-start questions kept for the second phase.
        peers: answers sampled per question for the second phase; one is shown as the agent's own.
        revisions: examples of the later-round format made of one question, each with another answer as the own one.
        alone: so many of these show the own answer without peers, so that the base can refine by itself
            (`self_refine` of arms) as well as in a debate.
        answer: training of the first phase.
        revision: training of the second phase.
    """

    revision_share: float = 0.5
    peers: int = 3
    revisions: int = 1
    alone: int = 0
    answer: FitConfig = field(default_factory=FitConfig)
    revision: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        if not 0 < self.revision_share < 1:
            raise UsageError(f"warm_start.revision_share is {self.revision_share}: give a share between 0 and 1.")
        if self.peers < 1:
            raise UsageError(f"warm_start.peers is {self.peers}: a revision needs at least the agent's own answer.")
        if not 1 <= self.revisions <= self.peers:
            raise UsageError(
                f"warm_start.revisions is {self.revisions}: give 1 to {self.peers} (warm_start.peers), since each "
                "revision of a question takes another answer as its own."
            )
        if not 0 <= self.alone < self.revisions:
            raise UsageError(
                f"warm_start.alone is {self.alone}: give 0 to {self.revisions - 1}, fewer than warm_start.revisions "
                f"({self.revisions}), since the others teach to debate."
            )


@dataclass(frozen=True)
class RunConfig:
    """A whole run, from questions to report.

    Attributes:
        name: the run's folder under `root`.
        root: where runs are kept.
        seeds: one run per seed; several seeds share a folder and a report.
        model: the model to distil into.
        task: what is asked.
        questions: how many questions each split gets.
        prompt: how questions and answers become prompts.
        engine: the embedded generation engine.
        warm_start: the training that yields the base model.
        debate: how the agents talk.
        team: who the agents are, where they are not all the base model: agent i is the i-th, from the start where they
            run out. The student is the base model all the same.
        methods: further ways to answer with several calls, evaluated beside the debate.
        select: which trajectories are kept.
        arms: students beside the debate's own, each trained on other data and compared with it. Controls have its
            questions and as many and as long trajectories of each: `control` (correct round-1 answers), `samples`
            (independent samples), `self_refine` (no peers in sight), `other_peers` (peers' answers are of another
            question), `hinted` (agents know the right answer), `majority`, `random` and `verifier` (no gold answer
            decides what is kept, but the vote, chance, or the base, asked what is right). Unmatched, for as many steps:
            `samples_budget` (all correct samples that the debate's tokens pay for), `vote_filtered` (samples that agree
            with their vote), `gold` (the task's rationales), `answer_only`, and any `select.variant`. Process-aware
            distillation: `pad` learns from what its own rollouts earn, judged by a process reward model of the debate,
            `pad_samples` by one of independent samples, `pad_outcome` by one that learned of the debate's whole answers
            whether they are right, `pad_random` by one that learned the labels of pad's dealt out at random, `vr` by
            the verifier alone; `student_budget` is the student of as many debates as pad's rollouts would pay for.
            `A_after_B` trains on the data of A from B's student on. Checks, no results: `twin` (the student's data
            again, from another training seed) and `planted` (the twin with `evaluate.planted` of its answers put
            right).
        prm: how the process reward models of `pad` and all `pad_…` are made.
        rl: how `pad`, all `pad_…` and `vr` learn from rollouts on the debated questions.
        fit: how every arm is trained on its trajectories.
        curve: further students trained on these shares of the debated questions, each in (0, 1); their accuracy
            against the number of trajectories is a curve in the report.
        evaluate: what is measured.
    """

    name: str = "run"
    root: str = "runs"
    seeds: list[int] = field(default_factory=lambda: [0])
    model: ModelSourceConfig = field(default_factory=ModelSourceConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    questions: QuestionCounts = field(default_factory=QuestionCounts)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    debate: DebateConfig = field(default_factory=DebateConfig)
    team: list[AgentConfig] = field(default_factory=list)
    methods: MethodsConfig = field(default_factory=MethodsConfig)
    select: SelectionConfig = field(default_factory=SelectionConfig)
    arms: list[str] = field(default_factory=lambda: [CONTROL])
    prm: PRMConfig = field(default_factory=PRMConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    curve: list[float] = field(default_factory=list)
    evaluate: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        check_name(self.name)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise UsageError(f"seeds is {self.seeds}: give one or more different seeds, none of them negative.")
        if any(not 0 < share < 1 for share in self.curve) or len(set(self.curve)) != len(self.curve):
            raise UsageError(f"curve is {self.curve}: give different shares of the questions, each between 0 and 1.")
        check_arms(self.arms)
        if PLANTED in self.arms:
            held_out, settings = self.questions.held_out, self.evaluate
            check_size(settings.planted, held_out, len(self.seeds), settings.level)
        if self.debate.aggregation == "weighted" and any(agent.api == "openai" for agent in self.team):
            raise UsageError(
                "debate.aggregation is weighted, which needs log-probabilities, and an agent of the team is behind an "
                "OpenAI endpoint, which has none: choose majority."
            )
        if "summary" in self.learned and self.debate.aggregation != "summariser":
            raise UsageError(
                f"select.variant or one of arms is summary, but debate.aggregation is {self.debate.aggregation}: set "
                "that to summariser, or choose another variant."
            )
        if {"pad", "pad_outcome"} <= self.reinforced and self.prm.labels == "outcome":
            raise UsageError(
                "prm.labels is outcome, so pad and pad_outcome of arms are one and the same: leave one of them out, or "
                "choose another source."
            )
        matched = [name for name in self.learned if name in ARMS and ARMS[name].matched]
        told = [name for name in matched if ARMS[name].variant is not None]
        if self.select.variant == "dialogue" and told:
            raise UsageError(
                f"select.variant is dialogue and {told[0]} is among arms: a single answer is never as long as a "
                "dialogue, so they cannot be matched. Choose other arms, such as self_refine, or set arms to []."
            )
        if "dialogue" in self.learned and self.debate.rounds < 2:
            raise UsageError(
                "select.variant or one of arms is dialogue, but debate.rounds is 1, so no answer responds to another: "
                "set that to 2 or more, or choose another variant."
            )
        for key in FITS:
            fit: FitConfig = attrgetter(key)(self)
            if key == "fit" and fit.eval_every is not None:
                raise UsageError(f"fit.eval_every is {fit.eval_every}: students are not validated, give null.")
            if fit.eval_every is not None and not self.questions.validation:
                raise UsageError(f"{key}.eval_every is {fit.eval_every}: set questions.validation too, or give null.")
            terms = set(fit.coefficients)
            if not terms <= {COMPLETION} and (key != "fit" or terms != {REASONING, ANSWER}):
                raise UsageError(
                    f"{key}.coefficients is {fit.coefficients}: the loss term is completion, or in fit the two terms "
                    "reasoning and answer."
                )

    @property
    def learned(self) -> set[str]:
        """The variant of the student and the names of the data of all other arms."""
        return {self.select.variant, *map(data_of, self.arms)} - {STUDENT}

    @property
    def reinforced(self) -> set[str]:
        """The names of the data of arms that learn from rollouts."""
        return {name for name in self.learned if ARMS[name].reinforced}

    @property
    def fits(self) -> tuple[str, ...]:
        """The keys of all trainings of the run."""
        judged = any(ARMS[name].judged for name in self.reinforced)
        wanted = [key for key in PAD_FITS if self.reinforced and (judged or key == "rl.fit")]
        return (*FITS, *(key for key in wanted if attrgetter(key)(self) is not None))

    @property
    def directory(self) -> Path:
        return Path(self.root) / self.name


@dataclass(frozen=True)
class PRMRun:
    """A process reward model by itself, of labels that are there already.

    Attributes:
        prompt: how questions and solutions become prompts.
        prm: how it is trained; what says where labels come from is not used.
    """

    prompt: PromptConfig = field(default_factory=PromptConfig)
    prm: PRMConfig = field(
        default_factory=lambda: PRMConfig(
            coefficients={"cross_entropy": 1.0},
            frozen=FitConfig(learning_rate=1e-4, epochs=3, last_layers=1, row_length=1024),
            whole=FitConfig(learning_rate=1e-6, row_length=1024),
        )
    )

    def __post_init__(self) -> None:
        default, name = PRMConfig(), "prm"
        for key in ("labels", "continuations", "hard", "questions", "turns"):
            if getattr(self.prm, key) != getattr(default, key):
                raise UsageError(f"{name}.{key}: labels are those of the data here; leave this key out.")
        for key in ("frozen", "whole"):
            fit: FitConfig | None = getattr(self.prm, key)
            if fit is not None and fit.eval_every is not None:
                raise UsageError(
                    f"{name}.{key}.eval_every is {fit.eval_every}: questions that are held out are for judging the "
                    "finished model, so they cannot choose when to stop; give null."
                )


@dataclass(frozen=True)
class EvaluateRun:
    """What one model can do on one task.

    Attributes:
        name: the evaluation's folder under `root`.
        root: where runs and evaluations are kept.
        seed: of samples and of whatever is drawn.
        model: a directory in Hugging Face format (such as the model of a run or of one of its stages), or a hub id.
        api: what `engine.servers` speak: `sglang`, or `openai` (addresses such as http://host:8000/v1), which tells
            text alone. Of the model only the tokenizer is then read.
        served: what an OpenAI endpoint calls the model; null: the only one it lists.
        task: what is asked; the questions are held-out ones.
        questions: how many.
        max_tokens: longest answer of a single call, in tokens.
        level: confidence level of every interval.
        prompt: how questions and answers become prompts.
        engine: who generates.
        debate: how the model debates with itself.
        methods: further ways to answer with several calls.
        suites: what is measured: `accuracy`, `self_correction`, `robustness`, `truthfulqa`, `generalisation`,
            `retention`, `quality`. What was measured before is kept, whatever is named.
        accuracy: settings of that suite.
        self_correction: settings of that suite.
        robustness: settings of that suite.
        truthfulqa: settings of that suite.
        generalisation: settings of that suite.
        retention: settings of that suite.
        quality: settings of that suite.
    """

    name: str = "evaluation"
    root: str = "runs"
    seed: int = 0
    model: str = ""
    api: Api = "sglang"
    served: str | None = None
    task: TaskConfig = field(default_factory=TaskConfig)
    questions: int = 200
    max_tokens: int = 512
    level: float = 0.95
    prompt: PromptConfig = field(default_factory=PromptConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    debate: DebateConfig = field(default_factory=lambda: DebateConfig(max_tokens=512))
    methods: MethodsConfig = field(default_factory=MethodsConfig)
    suites: list[str] = field(default_factory=lambda: ["accuracy"])
    accuracy: AccuracyConfig = field(default_factory=AccuracyConfig)
    self_correction: SelfCorrectionConfig = field(default_factory=SelfCorrectionConfig)
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)
    truthfulqa: TruthfulQAConfig = field(default_factory=TruthfulQAConfig)
    generalisation: GeneralisationConfig = field(default_factory=GeneralisationConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)

    def __post_init__(self) -> None:
        check_name(self.name)
        if not self.model:
            raise UsageError("model is missing: give --model DIR, or a hub id such as Qwen/Qwen3-0.6B.")
        if self.seed < 0 or self.questions < 1 or self.max_tokens < 1:
            raise UsageError(
                f"seed is {self.seed}, questions is {self.questions}, max_tokens is {self.max_tokens}: give a seed "
                "from 0 on, and at least one question and one token."
            )
        if not 0 < self.level < 1:
            raise UsageError(f"level is {self.level}: give a confidence level between 0 and 1, such as 0.95.")
        unknown = [name for name in self.suites if name not in SUITES]
        if unknown or not self.suites or len(set(self.suites)) != len(self.suites):
            raise UsageError(f"suites is {self.suites}: name some of {', '.join(SUITES)}, each once.")
        if self.api == "openai" and not self.engine.servers:
            raise UsageError("api is openai, but engine.servers is empty: give the endpoint's address.")
        if self.served is not None and self.api != "openai":
            raise UsageError(f"served is {self.served!r}, which is for api openai: leave it null.")
        if self.api == "openai" and "self_correction" in self.suites and self.self_correction.localisation:
            raise UsageError(
                "self_correction.localisation needs answers of a given form, which OpenAI endpoints do not take: set "
                "it to false."
            )
        self._check_needs()

    @property
    def directory(self) -> Path:
        return Path(self.root) / self.name

    def _check_needs(self) -> None:
        """What the suites that are named cannot do without."""
        text_only = self.api == "openai"
        needs = (
            ("generalisation", not self.generalisation.tasks, "generalisation.tasks is empty: give [{name: hotpotqa}]"),
            ("retention", not self.retention.base, "retention.base is missing: give the model this one was made from"),
            ("quality", not self.quality.judges, "quality.judges is empty: give [{model: DIR}], or two of them"),
            ("retention", text_only, "retention reads the model's weights, but api is openai: give its directory"),
            (
                "truthfulqa",
                text_only and self.truthfulqa.choices,
                "truthfulqa.choices needs log-probabilities, which OpenAI endpoints do not tell: set it to false",
            ),
        )
        for suite, lacking, what in needs:
            if lacking and suite in self.suites:
                raise UsageError(f"{what}, or leave {suite} out of suites.")


def check_name(name: object, whose: str = "run") -> None:
    """Raises UsageError for what cannot be the name of a folder of its own."""
    if not isinstance(name, str) or not WORD.fullmatch(name):
        raise UsageError(f"name is {name!r}: use letters, digits, '.', '_' and '-' for the {whose}'s folder.")


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Descriptions keep their line breaks."""


class _Parser(ArgumentParser):
    """An argument parser whose complaints are `UsageError`s that name the key and the nearest known one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(self._readable(message)) from ex

    def _readable(self, message: str) -> str:
        group = re.search(r"Group '([^']*)' does not accept option '([^']*)'", message)
        unknown = re.search(r"unrecognized arguments: --([\w.]+)", message)
        option = re.search(r"Option '([^']*)' is not accepted", message)
        wrong = re.search(r'Parser key "([^"]*)":\s*(.*)', message, re.DOTALL)
        if group:
            return self._unknown_key(f"{group[1]}.{group[2]}")
        if unknown:
            return self._unknown_key(unknown[1])
        if option:
            return self._unknown_key(option[1])
        if wrong:
            return f"{wrong[1]}: " + re.sub(r"<class '([^']*)'>", r"\1", " ".join(wrong[2].split()))
        return " ".join(message.split())

    def _unknown_key(self, key: str) -> str:
        known = [action.dest for action in self._actions if action.dest not in ("help", "print_config")]
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        near += [other for other in known if other.split(".")[-1] == key.split(".")[-1] and other not in near]
        hint = f"Did you mean {' or '.join(near)}?" if near else "--help lists the keys."
        return f"unknown key {key!r}. {hint}"


def parse(arguments: Sequence[str], prog: str, description: str) -> tuple[RunConfig, bool]:
    """The configuration of `--config FILE` (any number) and one option per key, and whether `--update` was given.

    Raises:
        UsageError: an unknown key, a value of the wrong type or out of range, an unreadable file.
    """
    return _parse(RunConfig, _check_parts, arguments, prog, description)


def parse_evaluate(arguments: Sequence[str], prog: str, description: str) -> tuple[EvaluateRun, bool]:
    """As `parse`, for an evaluation."""
    return _parse(EvaluateRun, lambda _: None, arguments, prog, description)


def _parse(
    group: type[T], check: Callable[[Namespace], None], arguments: Sequence[str], prog: str, description: str
) -> tuple[T, bool]:
    """What `parse` says, for the configuration `group`; `check` raises for parts that do not know their own keys."""
    parser = _Parser(prog=prog, description=description, default_env=False, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the keys below; later files and options win."
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="Accept a configuration that differs from the one the run directory was made with: stages that depend on "
        "the difference are redone, the others and every stored turn are reused.",
    )
    parser.add_class_arguments(group, None)
    try:
        namespace = _parsed(parser, arguments)
        _check_groups(namespace, group)
        check(namespace)
        values = parser.instantiate(namespace)
        config = group(**{name: values[name] for name in get_type_hints(group)})
        _check_secrets(config)
        return config, namespace["update"]
    except UsageError as error:
        raise UsageError(_located(str(error), arguments)) from error


def parse_prm(
    arguments: Sequence[str], prog: str, description: str, options: Mapping[str, Mapping[str, Any]]
) -> tuple[PRMRun, Namespace]:
    """The settings of a process reward model by itself, of `--config FILE` and one option per key, and further options.

    Args:
        options: what the parser's `add_argument` wants, by name.

    Raises:
        UsageError: as `parse`.
    """
    parser = _Parser(
        prog=prog, description=description, default_env=False, allow_abbrev=False, formatter_class=_Formatter
    )
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys; later files and options win")
    parser.add_class_arguments(PRMRun, None)
    try:
        namespace = _parsed(parser, arguments)
        _check_groups(namespace, PRMRun)
        _built(PRMConfig, namespace["prm"], "prm")
        values = parser.instantiate(namespace)
        return PRMRun(**{key: values[key] for key in PRMRun.__dataclass_fields__}), namespace
    except UsageError as error:
        raise UsageError(_located(str(error), arguments)) from error


def _parsed(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    try:
        return parser.parse_args(list(arguments))
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from error


def _check_groups(namespace: Namespace, group: type, prefix: str = "") -> None:
    """The parser lets null pass for any key of a group that is given as a whole, and any value for the group."""
    for name, wanted in get_type_hints(group).items():
        value = namespace[name]
        if value is None and type(None) not in get_args(wanted):
            raise UsageError(f"{prefix}{name}: null is not possible here, give a value of {wanted.__name__}")
        if is_dataclass(wanted) and isinstance(wanted, type):
            if not isinstance(value, Namespace):
                keys = ", ".join(get_type_hints(wanted))
                raise UsageError(f"{prefix}{name}: {value!r} is not possible here, give some of the keys {keys}")
            _check_groups(value, wanted, f"{prefix}{name}.")


def _check_secrets(config: Any) -> None:
    """A configuration is kept with its run, and shown in the report."""
    for key, value in flat(as_dict(config)).items():
        if any(redacted(text) != text for text in map(str, value if isinstance(value, list) else [value])):
            raise UsageError(
                f"{key}: holds a secret (a user in an address, a key), which would be kept with the run and shown in "
                "its report. Leave it out: tokens are taken from the environment (AGENTARK_SGLANG_TOKEN, "
                "AGENTARK_OPENAI_TOKEN, HF_TOKEN)."
            )


def _check_parts(namespace: Namespace) -> None:
    """Configurations that stand in several places do not know their own; complain with the whole key."""
    for key in (*FITS, "prm", "rl"):
        _built(_part(RunConfig, key), namespace[key], key)


def _built(part: type, values: Namespace, key: str) -> Any:
    """The configuration of a key, of its values. Raises UsageError with the key in front of what it complains about."""
    given = {}
    for name in get_type_hints(part):
        value = values[name]
        if isinstance(value, Namespace):
            inner = _part(part, name)
            value = _built(inner, value, key if inner in _NAMED_BY_THEIR_OWNERS else f"{key}.{name}")
        given[name] = value
    try:
        return part(**given)
    except UsageError as error:
        raise UsageError(f"{key}.{error}") from error


def _part(group: type, key: str) -> type:
    """The dataclass of a dotted key of a group."""
    first, *rest = key.split(".")
    hint = get_type_hints(group)[first]
    inner = next(each for each in (hint, *get_args(hint)) if is_dataclass(each) and isinstance(each, type))
    return _part(inner, ".".join(rest)) if rest else inner


def _located(message: str, arguments: Sequence[str]) -> str:
    """The message with the configuration files in front, unless it is about an option of the command line."""
    options = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
    if any(option[2:] in message for option in options if option != "--config"):
        return message
    joined = " ".join(arguments)
    files = re.findall(r"--config[= ](\S+)", joined)
    return f"{', '.join(files)}: {message}" if files and not any(file in message for file in files) else message


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON-like values."""
    return _plain(asdict(config))


def to_yaml(config: RunConfig | EvaluateRun) -> str:
    """The resolved configuration, as the run saves it."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; the groups of a list are counted from 0."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(place): each for place, each in enumerate(value)}
        result.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return result


def is_free(key: str) -> bool:
    """Whether a run directory takes a dotted key as it comes."""
    group = re.sub(r"\.\d+\.", ".", key) + "."
    return group.startswith(tuple(f"{free}." for free in FREE))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
