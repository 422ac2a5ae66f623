"""The run: from questions to a distilled model and the report on it, told stage by stage.

Every stage is a pure function of its own slice of the configuration and of the stages it reads. Model calls are kept
in the run's trace store, under keys that say everything they depend on, so no stage ever pays for one twice.
"""

import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from agentark_jax.arms import ARMS, PLANTED, STUDENT, TWIN, Arm, Judged, Source, data_of, start_of
from agentark_jax.asking import (
    GREEDY,
    ONCE,
    SAMPLED,
    ask_alone,
    ask_debate,
    ask_method,
    flatten,
    keep_keys,
    keep_predictions,
)
from agentark_jax.cast import Agents, Cast, check_found, identity, model_directory, size
from agentark_jax.checks import check_fits, check_lengths
from agentark_jax.config import RunConfig, as_dict
from agentark_jax.data.render import (
    OWN_FIRST,
    Format,
    PlainFormat,
    completion_example,
    dialogue_example,
    revision_example,
    turn_example,
)
from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.data.weighting import REASONING, Weighting, reasoning_and_answer, weigh
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.evaluation.checks import plant
from agentark_jax.evaluation.predictions import load_predictions
from agentark_jax.files import write_json
from agentark_jax.generation import Asked, Generation, Model, Seat
from agentark_jax.models import transformer, weights
from agentark_jax.models.config import load_config
from agentark_jax.models.gguf import resolve_model
from agentark_jax.models.source import SCRATCH
from agentark_jax.outcome import KEYS, PREDICTIONS, QUESTIONS, Evaluated, Outcome, outcome_of
from agentark_jax.policy import PolicySampler
from agentark_jax.process import LABELS, deal_labels, evaluate_prm, label_steps, step_examples, train_prm
from agentark_jax.progress import Display
from agentark_jax.protocols.calls import Draw
from agentark_jax.protocols.debate import longest_dialogue
from agentark_jax.protocols.methods import Settings
from agentark_jax.protocols.single import answer, explain
from agentark_jax.records import DEBATE, Example, Grade, Label, Question, Turn, questions_hash, stable_hash
from agentark_jax.stages import Manifest, Run, Work, read_manifest
from agentark_jax.tasks.items import answered
from agentark_jax.tasks.overlap import overlaps
from agentark_jax.tasks.task import Task, make_task
from agentark_jax.traces import exchange
from agentark_jax.traces import labels as labelling
from agentark_jax.traces.matching import check_matched, match, within_budget
from agentark_jax.traces.selection import Selection, check_filled, load_selection, save_selection, subset
from agentark_jax.traces.step_labels import load_step_labels
from agentark_jax.traces.store import TraceStore
from agentark_jax.traces.variants import select
from agentark_jax.training.checkpoint import remove_checkpoints
from agentark_jax.training.config import FitConfig
from agentark_jax.training.job import Job, for_steps, train
from agentark_jax.training.loop import planned_steps
from agentark_jax.training.prm_config import PAID, PRMConfig
from agentark_jax.training.rl import POLICIES
from agentark_jax.training.rl_config import verifiable_only
from agentark_jax.training.rl_job import RLJob, reinforce
from agentark_jax.training.state import partition
from agentark_jax.verifier import last_answers, verify

WARM_START = "warm_start"

# What a run can stop after; each part needs the ones before it.
PARTS = WARM_UP, DEBATE_PART, SELECT, FIT, EVERYTHING = "warm-start", "debate", "select", "fit", "everything"
SHARDS = "shards"


@dataclass(frozen=True)
class Common:
    """What all arms of a seed are made from; `longest` is that of `checks.check_lengths`."""

    agents: Agents
    form: Format
    drawn: Manifest
    questions: dict[str, list[Question]]
    spoken: dict[Source, tuple[Manifest, list[labelling.LabelledTurn]]]
    selections: dict[str, Selection]
    judges: dict[Judged, Manifest]
    longest: int


class Pipeline:
    """The stages of one seed's run, in order. Lives as long as its run directory is held.

    Args:
        store: where turns go.
        heard: where those are that arms learn from, if not in `store`.
    """

    def __init__(
        self,
        config: RunConfig,
        seed: int,
        run: Run,
        store: TraceStore,
        display: Display,
        heard: TraceStore | None = None,
    ):
        self.config = config
        self.seed = seed
        self.run = run
        self.store = store
        self.heard = heard or store
        self.display = display
        self.task: Task = make_task(config.task, asdict(config.questions))
        self.generation = Generation(config.engine, store, display, seed=seed)
        self.cast = Cast(config)
        self._longest = 0

    def __call__(self, until: str = EVERYTHING) -> Outcome | None:
        """Produce every stage that is not up to date; None where `until`, one of `PARTS`, is not the last of them."""
        common = self.prepare(until)
        if common is None:
            return None
        agents, form, questions = common.agents, common.form, common.questions
        students = self.distil_all(agents.base, form, common.selections, common.judges, questions["debate"])
        if until == FIT:
            return None
        evaluated = self.evaluate(agents, form, students, common.drawn, questions["held_out"])
        for judge in common.judges.values():
            self.evaluate_judge(judge, evaluated)
        return outcome_of(self.seed, self.run.directory, self.run.manifests, self.store)

    def make_common(self) -> Common:
        """All that does not depend on an arm: what arms are made from, and what base and judges are worth."""
        common = self.prepare()
        assert common is not None, "it is not to stop before"
        evaluated = self.evaluate(common.agents, common.form, {}, common.drawn, common.questions["held_out"])
        for judge in common.judges.values():
            self.evaluate_judge(judge, evaluated)
        return common

    def make_arms(self, common: Common, names: Collection[str]) -> None:
        """Train and evaluate some of the students of a seed; turns go to this pipeline's own store."""
        self._longest = common.longest
        agents, form, questions = common.agents, common.form, common.questions
        self.store.put_questions(question for split in questions.values() for question in split)
        students = self.distil_all(agents.base, form, common.selections, common.judges, questions["debate"], names)
        self.evaluate(agents, form, students, common.drawn, questions["held_out"], of_base=False)

    def prepare(self, until: str = EVERYTHING) -> Common | None:
        """Produce what arms are made from; None where `until` comes before that is done."""
        raw, team = self.prepare_model(), self.prepare_team()
        questions_stage, questions = self.prepare_questions()
        form = self.cast.form(raw)
        if form.tokenizer.unused_rows:
            rows = form.tokenizer.unused_rows
            self.display.say(
                f"the embedding has {rows} rows more than the tokenizer has tokens: padding, left as it is"
            )
        model = self.cast.model(raw, form)
        self._longest = check_lengths(self.config, model, self.cast.seats(model, team), self.cast.layout(), questions)
        found = self.prepare_judge(form)
        judge = None if found is None else self.cast.judge(found, form)
        check_fits(self.config, model_directory(raw), None if judge is None else judge.directory)
        base = self.warm_start(raw, form, questions_stage, questions)
        if until == WARM_UP:
            return None
        agents = Agents(base, team, self.cast.seats(self.cast.model(base, form), team))
        spoken: dict[Source, tuple[Manifest, list[labelling.LabelledTurn]]] = {
            source: self.speak(source, agents, questions_stage, questions["debate"])
            for source in self.sources()
            if source != "verified"
        }
        if until == DEBATE_PART:
            return None
        if "verified" in self.sources():
            spoken["verified"] = self.verify(base, form, *spoken["debate"])
        selections = self.select(spoken)
        if until == SELECT:
            return None
        judges = self.judge_all(base, form, spoken, found)
        return Common(agents, form, questions_stage, questions, spoken, selections, judges, self._longest)

    # Stages

    def prepare_model(self) -> Manifest:
        """Find, convert or initialise the raw model; the artefact says where it is and what its files hash to."""
        source = self.config.model

        def build(work: Work) -> None:
            if source.source == SCRATCH:
                directory = work.directory / "model"
                self._initialise(directory)
                location = "model"
            else:
                with self.display.bar("prepare the model", total=1):
                    directory = resolve_model(source.source)
                location = str(directory.resolve())
            work.counts = identity(directory, location)

        if source.source == SCRATCH:
            slice_ = {"scratch": as_dict(source.scratch), "task": as_dict(self.config.task), "seed": self.seed}
            inputs = {"questions": str(self.config.questions.warm_start)}
        else:
            slice_, inputs = {"source": source.source}, {}
        return self.run.produce("raw_model", build, version=1, config=slice_, inputs=inputs)

    def prepare_judge(self, form: Format) -> Manifest | None:
        """Find the model that process reward models start from; None where that is the base, or there are none."""
        source = self.config.prm.model
        if source is None or not self.judged():
            return None

        def build(work: Work) -> None:
            with self.display.bar("prepare the model of the judge", total=1):
                directory = resolve_model(source)
            self.cast.reads(directory, form)
            work.counts = identity(directory, str(directory.resolve()))

        return self.run.produce("prm_model", build, version=1, config={"source": source}, inputs={})

    def prepare_team(self) -> Manifest | None:
        """Find the models that agents of the team have for themselves; None where there are none."""
        models = sorted({member.model for member in self.config.team if member.model is not None})
        if not models:
            return None
        ours = {member.model for member in self.config.team if member.api == "sglang"}  # whose weights are read

        def build(work: Work) -> None:
            found = {}
            with self.display.bar("find the team's models", total=len(models)) as bar:
                for model in models:
                    directory = resolve_model(model, weights=model in ours).resolve()
                    revision = weights.weights_fingerprint(directory) if model in ours else None
                    found[model] = {"location": str(directory), "revision": revision}
                    bar.advance()
            work.counts = {"models": found}

        return self.run.produce(
            "team", build, version=1, config={"models": models, "read": sorted(ours - {None})}, inputs={}
        )

    def _initialise(self, directory: Path) -> None:
        """A random model of the configured shape and a tokenizer trained on the warm-start texts."""
        scratch = self.config.model.scratch
        texts = [
            text
            for question in self.task.questions("warm_start", self.config.questions.warm_start)
            for text in (
                PlainFormat.QUESTION.format(question=question.prompt),
                PlainFormat.RESPONSE.format(text=question.rationale),
            )
        ]
        labels = [PlainFormat.ANSWER, PlainFormat.OWN, PlainFormat.PEER, PlainFormat.REVISE]
        with weights.replaced_directory(directory) as fresh:
            train_tokenizer(texts + labels * len(texts), scratch.vocabulary, fresh)
            tokenizer = Tokenizer(fresh)
            raw = scratch.to_hf(vocabulary=tokenizer.vocabulary_size, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
            (fresh / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        config = load_config(directory)
        weights.save_pretrained(directory, config, transformer.init_params(config, self.seed), directory)

    def prepare_questions(self) -> tuple[Manifest, dict[str, list[Question]]]:
        """Draw the splits and keep them in the store; no question is in two of them."""
        sizes = asdict(self.config.questions)
        splits = self._splits()
        dropped = sum(sizes.values()) - sum(map(len, splits.values()))

        def build(work: Work) -> None:
            everything = [question for questions in splits.values() for question in questions]
            if len({question.prompt for question in everything}) != len(everything):
                raise AgentArkError("a question is in two splits: training and evaluation would not be apart.")
            self.store.put_questions(everything)
            lines = [json.dumps(asdict(question), ensure_ascii=False) + "\n" for question in everything]
            (work.directory / QUESTIONS).write_text("".join(lines))
            counts = {split: len(questions) for split, questions in splits.items()}
            work.counts = {**counts, "overlaps_dropped": dropped, "read": dict(self.task.counts), "hashes": hashes}

        hashes = {split: questions_hash(drawn) for split, drawn in splits.items()}
        config = {"task": as_dict(self.config.task), "sizes": sizes}
        inputs = {"questions": stable_hash(hashes)}
        return self.run.produce("questions", build, version=1, config=config, inputs=inputs), splits

    def _splits(self) -> dict[str, list[Question]]:
        """The questions of each split, none to learn from that overlaps a held-out one."""
        sizes = asdict(self.config.questions)
        drawn = {split: self.task.questions(split, count) for split, count in sizes.items()}
        learned = [question for split, questions in drawn.items() if split != "held_out" for question in questions]
        found = {overlap.learned.id: overlap for overlap in overlaps(learned, drawn["held_out"])}
        if found and self.config.evaluate.overlap == "refuse":
            shown = "\n".join(map(str, islice(found.values(), 5)))
            raise UsageError(
                f"{len(found)} of {len(learned)} questions to learn from overlap held-out ones: what is measured would "
                f"be memory. Take other questions, or leave these out with evaluate.overlap drop.\n{shown}"
            )
        return {split: [each for each in questions if each.id not in found] for split, questions in drawn.items()}

    def warm_start(
        self, raw: Manifest, form: Format, drawn: Manifest, questions: Mapping[str, list[Question]]
    ) -> Manifest:
        """Teach the raw model the answer format, then the later-round format on its own sampled answers.

        The result is the base that every arm starts from and is compared with.
        """
        settings = self.config.warm_start
        split = questions["warm_start"]
        cut = max(1, round(len(split) * (1 - settings.revision_share)))
        first, second = split[:cut], split[cut:]
        if not second:
            raise UsageError("warm_start.revision_share leaves no question for the second phase: raise it.")

        def answers(of: Sequence[Question]) -> list[Example]:
            return [
                completion_example(form.question(q), form.response(q.rationale), question_id=q.id, variant="gold")
                for q in of
            ]

        def build_answers(work: Work) -> None:
            validation = answers(questions["validation"])
            self._fit(work, "teach answers", settings.answer, raw, answers(first), validation)

        taught = self.run.produce(
            "warm_start_answers",
            build_answers,
            version=1,
            # All later stages descend from this one, so they are redone with it when the format changes.
            config={"fit": settings.answer.fingerprint(), "count": cut, "format": form.hash, "seed": self.seed},
            inputs={"model": raw, "questions": drawn},
        )

        def build_samples(work: Work) -> None:
            draw = Draw(self.config.debate.temperature, self.config.debate.max_tokens)
            turns, _ = self._sample(
                work,
                "sample own answers",
                seats=[self.cast.seat(self.cast.model(taught, form))],
                questions=second,
                draw=draw,
                samples=settings.peers,
                protocol=WARM_START,
            )
            self._label(turns)
            keep_keys(work, turns)

        sampled = self.run.produce(
            "warm_start_samples",
            build_samples,
            version=1,
            config={
                **self.config.engine.fingerprint(),
                "peers": settings.peers,
                "temperature": self.config.debate.temperature,
                "max_tokens": self.config.debate.max_tokens,
                "seed": self.seed,
            },
            inputs={"model": taught, "questions": drawn},
        )

        def build_base(work: Work) -> None:
            peers = self._sampled(sampled)
            revisions = [
                revision_example(
                    form, question, peers[question.id], index + turn, self.cast.layout(), alone=turn < settings.alone
                )
                for index, question in enumerate(second)
                for turn in range(settings.revisions)
            ]
            validation = answers(questions["validation"])
            examples = answers(second) + revisions
            self._fit(work, "teach revision", settings.revision, taught, examples, validation)

        return self.run.produce(
            "base",
            build_base,
            version=1,
            config={
                "fit": settings.revision.fingerprint(),
                "revisions": settings.revisions,
                **({"alone": settings.alone} if settings.alone else {}),
                "seed": self.seed,
                **({} if self.cast.layout() == OWN_FIRST else {"layout": asdict(self.cast.layout())}),
            },
            inputs={"model": taught, "samples": sampled},
        )

    def speak(
        self, source: Source, agents: Agents, drawn: Manifest | str, questions: list[Question]
    ) -> tuple[Manifest, list[labelling.LabelledTurn]]:
        """Let the agents debate the debate split, or say what other arms learn from; label every turn."""
        settings = self.config.debate
        draw = Draw(settings.temperature, settings.max_tokens)
        title = "debate" if source == "debate" else f"turns of {source}"
        config: dict[str, Any]
        if source in ("samples", "hinted"):
            # As many calls as a debate makes; an agent that knows the answer needs no second chance.
            samples = settings.agents * (settings.rounds if source == "samples" else 1)
            how = answer if source == "samples" else explain
            config = {"protocol": source, "samples": samples, **asdict(draw)}
            generate = partial(self._sample, seats=agents.seats, draw=draw, samples=samples, protocol=source, how=how)
        else:
            if source != "debate" and self.config.select.variant != "summary":
                settings = replace(settings, aggregation="majority")  # nobody learns from the last call
            debates = self._debates_for_rollouts(questions) if source == "debates" else 1
            if source == "self_refine":
                settings = replace(settings, topology="none")
            elif source == "other_peers":
                settings = replace(settings, peers="other")
            config = {"debate": asdict(settings), **({"debates": debates} if debates > 1 else {})}
            generate = partial(self._debate_all, seats=agents.seats, settings=settings, debates=debates)

        def build(work: Work) -> None:
            if source == "debate":
                self._gather_shards()
            turns = generate(work, title, questions=questions)[0]
            labels = self._label(turns)
            keep_keys(work, turns)
            work.counts["verdicts"] = {
                verdict: sum(label.verdict == verdict for label in labels.values())
                for verdict in ("right", "wrong", "unparseable")
            }

        stage = self.run.produce(
            "debate" if source == "debate" else f"turns_{source}",
            build,
            version=1,
            config={
                **self.config.engine.fingerprint(),
                **config,
                "seed": self.seed,
                "grader": self.task.grader_id,
                **self.cast.team_slice(),
            },
            inputs={**agents.inputs, "questions": drawn},
        )
        return stage, self._said_in(stage)

    def _debates_for_rollouts(self, questions: Sequence[Question]) -> int:
        """So many debates of each question take at least as many calls as the debate and a policy's rollouts."""
        calls = len(questions) * self.config.debate.agents * self.config.debate.rounds
        rl = self.config.rl
        return 1 + math.ceil(rl.iterations * rl.questions * rl.group_size / calls)

    def debate_shard(self, whole: Path, shard: int, shards: int) -> None:
        """Debate one worker's share of the questions with the base that the run in the directory `whole` has made.

        What is said goes to this pipeline's own store; the run gathers it from there.
        """
        raw, base = (read_manifest(whole / stage) for stage in ("raw_model", "base"))
        if raw is None or base is None:
            raise UsageError(f"{whole} has no finished base: make it with `agentark warm-start` and this config first.")
        splits, team = self._splits(), self.prepare_team()
        model = self.cast.model(raw, self.cast.form(raw))
        self._longest = check_lengths(self.config, model, self.cast.seats(model, team), self.cast.layout(), splits)
        mine = [question for question in splits["debate"] if exchange.shard_of(question.id, shards) == shard]
        self.display.say(f"{len(mine)} of {len(splits['debate'])} questions")
        self.store.put_questions(mine)
        agents = Agents(base, team, self.cast.seats(self.cast.model(base, model.form), team))
        self.speak("debate", agents, stable_hash([question.id for question in mine]), mine)

    def _gather_shards(self) -> None:
        """Add what workers have said so far to the store: none of it is asked again."""
        for path in sorted((self.run.directory / SHARDS).glob("[0-9]*/traces.sqlite")):
            with self.display.bar(f"gather {path.parent.name}", total=None) as bar:
                added = exchange.merge(self.store, str(path), bar.more)
            self.display.say(f"{path.parent.name}: {added:,} turns added")

    def arms(self) -> dict[str, Arm]:
        """What the arms beside the student learn from, by the name of their data."""
        return {name: ARMS[name] for name in map(data_of, self.config.arms) if name != STUDENT}

    def sources(self) -> list[Source]:
        """Whose turns are learned from: the debate's first."""
        heard = [each.source for each in self.arms().values() if each.generated]
        return list(dict.fromkeys(["debate", *heard, *(each.turns for each in self.judged())]))

    def verify(
        self, base: Manifest, form: Format, spoken: Manifest, rows: Sequence[labelling.LabelledTurn]
    ) -> tuple[Manifest, list[labelling.LabelledTurn]]:
        """The debate's last-round answers with verdicts of the base, which is told no right answer, in the place of the
        grader's. Raises AgentArkError where it calls none of them right."""
        seat, answers = self.cast.seat(self.cast.model(base, form)), last_answers(rows)
        keys = [row.key for row in answers]

        def build(work: Work) -> None:
            verify(work, answers, self.store, generation=self.generation, seat=seat, display=self.display)
            (work.directory / KEYS).write_text(json.dumps(keys))

        stage = self.run.produce(
            "verdicts",
            build,
            version=1,
            config=self.config.engine.fingerprint(),
            inputs={"spoken": spoken, "base": base},
        )
        if not stage.counts["right"]:
            told = ", ".join(f"{stage.counts[name]} {name}" for name in ("wrong", "unparseable", "too_long"))
            raise AgentArkError(
                f"arms: verifier learns what the base calls right, and of {len(keys)} last-round answers it calls none "
                f"right ({told}). Leave verifier out, or take a model.source that can tell."
            )
        return stage, labelling.labelled_turns(self.store, stage.counts["grader"], keys=keys)

    def select(
        self, spoken: Mapping[Source, tuple[Manifest, Sequence[labelling.LabelledTurn]]]
    ) -> dict[str, Selection]:
        """Choose the trajectories of the student and of the arms, and match those arms to it that are controls."""
        settings = self.config.select
        arms = {name: each for name, each in self.arms().items() if each.generated}
        controls = [name for name, each in arms.items() if each.matched]
        names = [STUDENT, *arms, *(share_name(share) for share in self.config.curve)]

        def choose(each: Arm) -> Selection:
            rows = spoken[each.source][1]
            if each.budget:
                rows = within_budget(rows, spoken["debate"][1])
            whole = replace(settings, limit=None, fraction=1.0)
            if each.source == "debates":
                whole = replace(whole, per_question=None)
            if each.variant is not None:
                whole = replace(whole, variant=each.variant, per_question=None)
            return select(rows, whole, self.store.completions)

        def build(work: Work) -> None:
            chosen = {STUDENT: select(spoken["debate"][1], settings, self.store.completions)}
            chosen |= {name: choose(each) for name, each in arms.items()}
            for name, selection in chosen.items():
                check_filled(name, selection)
            blind = {name for name in controls if arms[name].source == "verified"}
            matched = match({name: chosen[name] for name in (STUDENT, *controls)}, settings.seed, blind)
            chosen |= matched.selections
            for share in self.config.curve:
                chosen[share_name(share)] = subset(chosen[STUDENT], share, settings.seed)
            for name, selection in chosen.items():
                save_selection(selection, work.directory / f"{name}.parquet")
            work.counts = {
                "selections": {name: selection.figures for name, selection in chosen.items()},
                "matched": matched.figures if controls else None,
            }

        stage = self.run.produce(
            "select",
            build,
            version=3,
            config={"select": asdict(settings), "curve": self.config.curve, "arms": list(arms)},
            inputs={source: manifest for source, (manifest, _) in spoken.items()},
        )
        selections = {name: load_selection(stage.directory / f"{name}.parquet") for name in names}
        if controls:
            check_matched({name: selections[name] for name in (STUDENT, *controls)}, stage.counts["matched"])
        return selections

    def judged(self) -> list[Judged]:
        """What process reward models learn from."""
        return list(dict.fromkeys(each.judged for each in self.arms().values() if each.judged is not None))

    def judge_all(
        self,
        base: Manifest,
        form: Format,
        spoken: Mapping[Source, tuple[Manifest, Sequence[labelling.LabelledTurn]]],
        found: Manifest | None = None,
    ) -> dict[Judged, Manifest]:
        """The process reward models of the run (PAD, §2.3): labels of the steps of what was said, then the base, or
        the model that was `found` for them, trained on them."""
        labels: dict[Judged, Manifest] = {}

        def labelled(kind: Judged) -> Manifest:
            if kind not in labels:
                if kind.labels == "random":
                    labels[kind] = self.deal_labels(kind, labelled(replace(kind, labels="configured")))
                else:
                    labels[kind] = self.label_steps(kind, base, form, *spoken[kind.turns])
            return labels[kind]

        if found is None:
            start, model = base, self.cast.model(base, form)
        else:
            start, model = found, self.cast.judge(found, form)
        return {kind: self.judge(kind, start, model, labelled(kind)) for kind in self.judged()}

    def prm_settings(self, kind: Judged) -> PRMConfig:
        """How a process reward model is made, and the labels, if they are not dealt, that it learns."""
        return replace(self.config.prm, labels="outcome") if kind.labels == "outcome" else self.config.prm

    def label_steps(
        self, kind: Judged, base: Manifest, form: Format, spoken: Manifest, rows: Sequence[labelling.LabelledTurn]
    ) -> Manifest:
        """Labels of the steps of what was said; a model that is asked for them is the base."""
        settings, seat = self.prm_settings(kind), self.cast.seat(self.cast.model(base, form))
        draw = Draw(self.config.debate.temperature, self.config.debate.max_tokens)

        def label(work: Work) -> None:
            label_steps(
                work,
                settings,
                rows,
                self.store,
                grade=self.task.grade,
                draw=draw,
                seed=self.seed,
                generation=self.generation,
                display=self.display,
                tokenizers=self.cast.tokenizers(form),
                speaker=seat,
                judge=seat,
            )

        asked = {**self.config.engine.fingerprint(), **asdict(draw), "seed": self.seed}
        return self.run.produce(
            f"step_labels{kind.suffix}",
            label,
            version=1,
            config={**settings.labels_fingerprint(), **(asked if settings.labels in PAID else {})},
            inputs={"spoken": spoken, "base": base},
        )

    def deal_labels(self, kind: Judged, labels: Manifest) -> Manifest:
        """The labels of another stage, dealt out at random among the steps."""
        return self.run.produce(
            f"step_labels{kind.suffix}",
            lambda work: deal_labels(work, labels.directory / LABELS, self.seed),
            version=1,
            config={"seed": self.seed},
            inputs={"labels": labels},
        )

    def judge(self, kind: Judged, start: Manifest, model: Model, labels: Manifest) -> Manifest:
        """The process reward model that starts from the model of a stage and learns these labels."""
        settings = self.prm_settings(kind)

        def build(work: Work) -> None:
            self.generation.release()  # training needs the room
            examples, counts = step_examples(model.form, self.store, load_step_labels(labels.directory / LABELS))
            train_prm(
                work,
                settings,
                model,
                self.config.prompt,
                examples,
                labels="random" if kind.labels == "random" else None,
                seed=self.seed,
                display=self.display,
            )
            work.counts |= {"labels": counts}

        return self.run.produce(
            f"prm{kind.suffix}",
            build,
            version=1,
            config={**settings.fingerprint(), "seed": self.seed},
            inputs={"base": start, "labels": labels},
        )

    def evaluate_judge(self, judge: Manifest, evaluated: Mapping[str, Evaluated]) -> Manifest:
        """What a process reward model says of the base's samples and debates on held-out questions."""
        vote, debated = evaluated["vote"].manifest, evaluated["debate"].manifest
        level = self.config.evaluate.level

        def build(work: Work) -> None:
            self.generation.release()
            sampled, said = self._said_in(vote), self._said_in(debated)
            evaluate_prm(work, model_directory(judge), self.store, sampled=sampled, debated=said, level=level)

        inputs = {"prm": judge, "vote": vote, "debate": debated}
        return self.run.produce(f"evaluate_{judge.stage}", build, version=3, config={"level": level}, inputs=inputs)

    def reinforce(
        self, name: str, start: Manifest, form: Format, judge: Manifest | None, questions: Sequence[Question]
    ) -> Manifest:
        """A policy learns from what its own rollouts on the debated questions earn (PAD, §2.3).

        Args:
            start: the stage that has the policy to start from.
            judge: the stage that has the process reward model; None: the verifier alone decides.
        """
        rl = self.config.rl if judge is not None else verifiable_only(self.config.rl)
        model, limit = self.cast.model(start, form), self.config.debate.max_tokens
        seat = self.cast.seat(model)
        needed = judge if rl.needs_prm else None

        def build(work: Work) -> None:
            self.generation.release()
            job = RLJob(
                rl,
                model.directory,
                model.revision,
                form.tokenizer.hash,
                questions,
                limit,
                None if needed is None else model_directory(needed),
                None if needed is None else needed.counts["revision"],
                bool(seat.servers),
                [np.asarray([t for part in form.question(each) for t in part], np.int32) for each in questions[:4]],
                work.directory,
                self.seed,
            )
            rollouts = rl.iterations * rl.questions * rl.group_size
            with self.display.bar(f"reinforce {name}", total=rollouts) as bar:
                draw = Draw(rl.temperature, limit)
                ours = (self.generation, self.store, self.task, model, seat.servers)
                result = reinforce(job, PolicySampler(*ours, draw, rl.group_size, self._longest, bar))
            self.display.say(_shares(name, result.spent))
            trained = result.adapter
            if trained is None:
                trained = partition(result.params, rl.fit.freeze, last_layers=rl.fit.last_layers)[0]
            work.tokens = result.tokens
            work.counts |= {
                "revision": weights.weights_fingerprint(work.directory / "model"),
                "location": "model",
                "trainable": size(trained),
                "examples": result.counts["rollouts"],
                "steps": result.steps,
                "iterations": result.iterations,
                "tokens": result.tokens,
                "loss_tokens": result.loss_tokens,
                "final_loss": result.history[-1].get("loss", 0.0),
                "stopped": result.ending,
                "alarms": result.alarms,
                "rollouts": result.counts,
            }
            record = {"history": [], "validation": [], "iterations": result.history, "consumed": result.consumed}
            write_json(work.directory / "training.json", record)
            remove_checkpoints(work.directory)
            if (work.directory / POLICIES).exists():  # what was published for servers
                shutil.rmtree(work.directory / POLICIES)

        return self.run.produce(
            name,
            build,
            version=1,
            config={
                **self.config.engine.fingerprint(),
                "rl": rl.fingerprint(),
                "max_tokens": limit,
                "questions": stable_hash([question.id for question in questions]),
                "seed": self.seed,
                "grader": self.task.grader_id,
            },
            inputs={"start": start, **({} if needed is None else {"prm": needed})},
        )

    def distil_all(
        self,
        base: Manifest,
        form: Format,
        selections: Mapping[str, Selection],
        judges: Mapping[Judged, Manifest],
        questions: Sequence[Question],
        names: Collection[str] | None = None,
    ) -> dict[str, Manifest]:
        """Every arm's student; all start from the base but those that go on from another arm's.

        With `names`, those students alone, whichever they start from being among them.
        """
        by_id = {question.id: question for question in questions}
        wanted = (
            students_of(self.config) if names is None else [name for name in students_of(self.config) if name in names]
        )
        students: dict[str, Manifest] = {}
        if STUDENT in wanted:
            students[STUDENT] = self.distil(STUDENT, base, form, selections[STUDENT], by_id)
            steps = students[STUDENT].counts["steps"]
        else:  # somebody else trains it
            examples = self._said(selections[STUDENT], form, by_id)
            steps = planned_steps(self.config.fit, examples, self.seed)
        asked = sorted({trajectory.question_id for trajectory in selections[STUDENT].trajectories})
        arms = self.arms()
        for name in (name for name in self.config.arms if name in wanted and name != PLANTED):
            data, start = data_of(name), start_of(name)
            begun = base if start is None else students[start]
            if data != STUDENT and arms[data].reinforced:
                kind = arms[data].judged
                judge = None if kind is None else judges[kind]
                students[name] = self.reinforce(name, begun, form, judge, questions)
                continue
            again = data != STUDENT and arms[data].source == "student"
            as_student = data == STUDENT or again or arms[data].matched or arms[data].source == "debates"
            own = STUDENT if again else data
            students[name] = self.distil(
                name,
                begun,
                form,
                selections[own] if own in selections else [by_id[question_id] for question_id in asked],
                by_id,
                steps=None if as_student else steps,
            )
        for name in (name for name in map(share_name, self.config.curve) if name in wanted):
            students[name] = self.distil(name, base, form, selections[name], by_id)
        return students

    def distil(
        self,
        name: str,
        start: Manifest,
        form: Format,
        learned: Selection | Sequence[Question],
        questions: Mapping[str, Question],
        *,
        steps: int | None = None,
    ) -> Manifest:
        """R-SFT (AgentArk §2.1): a model learns trajectories on the question alone, no peers in sight.

        Args:
            start: the stage that has the model.
            learned: trajectories, or questions whose own rationales or answers are learned.
            questions: those of the trajectories, by id.
            steps: train for so many, however many epochs they take; None: for the configured epochs.
        """
        weighting: Weighting = "tokens"
        seed = twin_seed(self.seed) if name == TWIN else self.seed
        if isinstance(learned, Selection):
            weighting = replace(self.config.select, variant=learned.variant).weighs
            if steps is None:  # as the student
                weighting = self.config.select.weighs
            content = stable_hash([[t.turn_key for t in learned.trajectories], learned.variant])
        else:
            content = stable_hash(
                [name, self.task.grader_id, [[each.id, each.rationale, each.answer] for each in learned]]
            )

        def build(work: Work) -> None:
            examples = (
                self._said(learned, form, questions)
                if isinstance(learned, Selection)
                else self._written(work, data_of(name), learned, form)
            )
            examples = weigh(examples, weighting)
            if self.config.fit.coefficients.keys() >= {REASONING}:
                examples = [reasoning_and_answer(example, form.tokenizer) for example in examples]
            config = self.config.fit if steps is None else for_steps(self.config.fit, examples, steps)
            self._fit(work, f"distil {name}", config, start, examples, [], seed)

        return self.run.produce(
            name,
            build,
            version=1,
            config={
                "fit": self.config.fit.fingerprint(),
                "seed": seed,
                **({} if weighting == "tokens" else {"weighting": weighting}),
                **({} if steps is None else {"steps": steps}),
            },
            inputs={"base": start, "trajectories": content},
        )

    def _said(self, selection: Selection, form: Format, questions: Mapping[str, Question]) -> list[Example]:
        """An example of every trajectory, in their order."""
        chosen = {trajectory.turn_key: trajectory for trajectory in selection.trajectories}
        example = turn_example
        if selection.variant == "dialogue":
            told = {key for trajectory in selection.trajectories for key in trajectory.trace_keys}
            example = partial(dialogue_example, parents={turn.key: turn for turn in self.heard.turns(keys=told)})
        examples = {
            turn.key: example(
                form,
                questions[turn.call.question_id],
                turn,
                variant=selection.variant,
                trace_keys=chosen[turn.key].trace_keys,
            )
            for turn in self.heard.turns(keys=chosen, errors=False)
        }
        return [examples[key] for key in chosen]

    def _written(self, work: Work, name: str, questions: Sequence[Question], form: Format) -> list[Example]:
        """An example of what the task itself says of each question, where its grader can read that."""
        whole = ARMS[name].source == "rationales"
        texts = {each.id: each.rationale if whole else answered("", each.answer) for each in questions}
        readable = [each for each in questions if self.task.grade(each, texts[each.id]).verdict == "right"]
        if not readable:
            raise AgentArkError(
                f"arms: {self.task.grader_id} can read none of the {len(questions)} texts that {name} would learn, the "
                f"first being {texts[questions[0].id]!r}: leave that arm out."
            )
        work.counts["unreadable"] = len(questions) - len(readable)
        return [
            completion_example(form.question(each), form.response(texts[each.id]), question_id=each.id, variant=name)
            for each in readable
        ]

    def evaluate(
        self,
        agents: Agents,
        form: Format,
        students: Mapping[str, Manifest],
        drawn: Manifest,
        questions: list[Question],
        of_base: bool = True,
    ) -> dict[str, Evaluated]:
        """Every arm on the held-out questions; what takes many calls of the base on a stated subset of them.

        Without `of_base` the students alone.
        """
        settings = self.config.evaluate
        few = questions[: settings.multi_call_questions or len(questions)]
        sampled = Draw(self.config.debate.temperature, self.config.debate.max_tokens)
        one = Draw(settings.temperature, self.config.debate.max_tokens)
        protocol = GREEDY if settings.temperature == 0 else ONCE
        evaluated: dict[str, Evaluated] = {}

        def measure(
            name: str,
            inputs: Mapping[str, Manifest],
            asked: list[Question],
            config: Mapping[str, Any],
            generate: Callable[[Work], tuple[Asked, Asked]],
            final: str = "",
        ) -> None:
            """`generate` gives each question's turns, and those of them that vote on the answer; `final`: `_label`."""

            def build(work: Work) -> None:
                turns, voters = generate(work)
                labels = self._label(turns, final)
                keep_predictions(work, asked, turns, voters, labels)

            stage = self.run.produce(
                f"evaluate_{name}",
                build,
                version=1,
                config={
                    "max_tokens": self.config.debate.max_tokens,
                    **config,
                    **self.config.engine.fingerprint(),
                    "questions": len(asked),
                    "seed": self.seed,
                    "grader": self._grader(final),
                },
                inputs={**inputs, "questions": drawn},
            )
            evaluated[name] = Evaluated(name, stage, load_predictions(stage.directory / PREDICTIONS))

        def alone(
            name: str,
            model: Manifest,
            asked: list[Question],
            draw: Draw,
            samples: int,
            protocol: str,
            final: str = "",
        ) -> None:
            def generate(work: Work) -> tuple[Asked, Asked]:
                return self._sample(
                    work,
                    f"evaluate {name}",
                    seats=[self.cast.seat(self.cast.model(model, form))],
                    questions=asked,
                    draw=draw,
                    samples=samples,
                    protocol=protocol,
                )

            several = {} if protocol == GREEDY else {"samples": samples, "temperature": draw.temperature}
            measure(
                name,
                {"model": model},
                asked,
                {"protocol": protocol, **several, "max_tokens": draw.max_tokens},
                generate,
                final,
            )

        def together(name: str, config: Mapping[str, Any], generate: Callable[[Work], tuple[Asked, Asked]]) -> None:
            inputs = {"model" if each == "base" else each: stage for each, stage in agents.inputs.items()}
            measure(name, inputs, few, {**config, **self.cast.team_slice()}, generate)

        if of_base:
            alone("base", agents.base, questions, one, 1, protocol)
            alone("vote", agents.base, few, sampled, settings.vote_samples, SAMPLED)
            debated = replace(self.config.debate, rounds=settings.rounds)
            together(
                "debate",
                {"protocol": DEBATE, "debate": asdict(debated)},
                lambda work: self._debate_all(
                    work, "evaluate debate", seats=agents.seats, questions=few, settings=debated
                ),
            )
            for name, method in self.config.methods.chosen().items():
                together(
                    name,
                    {"method": as_dict(method), "context": self.config.methods.context},
                    partial(self._carry_out, f"evaluate {name}", agents.seats, few, method),
                )
        for name, student in students.items():
            draw, final = one, ""
            each = self.arms().get(data_of(name))
            if ((each and each.variant) or self.config.select.variant) == "dialogue":
                # Its answer is as long as several, and only the last of them counts.
                draw = replace(one, max_tokens=longest_dialogue(form, self.config.debate))
                final = form.telling[-1].strip()
            alone(name, student, questions, draw, 1, protocol, final)
            if name == TWIN and PLANTED in self.config.arms:
                measure(
                    PLANTED,
                    {"twin": evaluated[TWIN].manifest},
                    questions,
                    {"protocol": PLANTED, "share": settings.planted},
                    partial(self._plant, evaluated[TWIN], form, questions),
                    final,
                )
        return evaluated

    def _plant(self, twin: Evaluated, form: Format, asked: Sequence[Question], work: Work) -> tuple[Asked, Asked]:
        """The twin's turns, some wrong ones replaced by right ones, which are put into the store."""
        share = self.config.evaluate.planted
        keys = [key for prediction in twin.predictions for key in prediction.turn_keys]
        said = {turn.call.question_id: turn for store in (self.heard, self.store) for turn in store.turns(keys=keys)}
        turns = plant(
            said,
            twin.predictions,
            {question.id: question for question in asked},
            share=share,
            seed=self.seed,
            form=form,
            reads=lambda question, text: self.task.grade(question, text).verdict == "right",
        )
        self.store.record_many(turns.values())
        work.counts = {"planted": sum(turns[each] is not said[each] for each in turns)}
        answers = {question.id: [turns[question.id]] for question in asked}
        return answers, answers

    # What stages share

    def _fit(
        self,
        work: Work,
        title: str,
        config: FitConfig,
        model: Manifest,
        examples: Sequence[Example],
        validation: Sequence[Example],
        seed: int | None = None,
    ) -> None:
        """Train the model of a stage on examples; the artefacts are the new model and the training's record."""
        self.generation.release()  # training needs the room
        check_found(model)
        directory, revision = model_directory(model), model.counts["revision"]
        seed = self.seed if seed is None else seed
        job = Job(config, directory, revision, examples, validation, work.directory, seed)
        with self.display.bar(title, total=1) as bar:
            result = train(job, bar.set)
        trained = partition(result.params, config.freeze)[0] if result.adapter is None else result.adapter
        work.tokens = result.tokens
        work.counts |= {
            "revision": weights.weights_fingerprint(work.directory / "model"),
            "location": "model",
            "trainable": size(trained),
            "examples": len(examples),
            "steps": result.steps,
            "tokens": result.tokens,
            "loss_tokens": result.loss_tokens,
            "final_loss": result.history[-1][1],
            "stopped": result.stopped,
        }
        record = {"history": result.history, "validation": result.validation_history}
        write_json(work.directory / "training.json", record)
        remove_checkpoints(work.directory)

    def _sample(self, work: Work, title: str, **settings: Any) -> tuple[Asked, Asked]:
        return ask_alone(self.generation, work, title, context=self._longest, **settings)

    def _debate_all(self, work: Work, title: str, **settings: Any) -> tuple[Asked, Asked]:
        return ask_debate(
            self.generation, work, title, seed=self.seed, context=self._longest, read=self._read, **settings
        )

    def _carry_out(
        self, title: str, seats: Sequence[Seat], questions: Sequence[Question], method: Settings, work: Work
    ) -> tuple[Asked, Asked]:
        context = self.config.methods.context
        settings: dict[str, Any] = {"seats": seats, "questions": questions, "method": method, "context": context}
        return ask_method(self.generation, work, title, read=self._read, **settings)

    def _read(self, question: Question, text: str) -> str:
        return self.task.grade(question, text).answer

    def _label(self, turns: Mapping[str, Sequence[Turn]], final: str = "") -> dict[str, Label]:
        """Grade turns and keep the labels. Of texts with the words `final` only what stands after the last of them."""

        def grade(question: Question, text: str) -> Grade:
            return self.task.grade(question, text.rpartition(final)[2] if final else text)

        return labelling.label_turns(self.store, flatten(turns), grade, self._grader(final))

    def _grader(self, final: str = "") -> str:
        return f"{self.task.grader_id} after {final!r}" if final else self.task.grader_id

    def _said_in(self, stage: Manifest) -> list[labelling.LabelledTurn]:
        """The turns that a stage lists, with their labels."""
        return labelling.labelled_turns(self.store, self.task.grader_id, keys=_keys(stage))

    def _sampled(self, stage: Manifest) -> dict[str, dict[str, list[int]]]:
        """What the turns of a stage said, by question and key, as ids, in the order in which the stage lists them."""
        keys = _keys(stage)
        said = {
            turn.key: (turn.call.question_id, _completion_ids(turn))
            for turn in self.store.turns(keys=keys, errors=False)
        }
        if len(said) != len(keys):
            raise AgentArkError(
                f"{self.store.path}: lacks turns that {stage.directory} lists. Delete {stage.directory} and run again."
            )
        answers: dict[str, dict[str, list[int]]] = {}
        for key in keys:
            question_id, ids = said[key]
            answers.setdefault(question_id, {})[key] = ids
        return answers


def _shares(name: str, spent: Mapping[str, float]) -> str:
    """Where the time of a policy's iterations went, in words."""
    whole = spent["step_seconds"] or 1.0
    parts = {
        "rollout": "sampling",
        "scoring": "scoring",
        "rewards": "rewards",
        "training": "training",
        "sync": "weights handed out",
    }
    told = ", ".join(f"{words} {spent.get(f'{part}_seconds', 0.0) / whole:.0%}" for part, words in parts.items())
    return f"{name}: {told}"


def _keys(stage: Manifest) -> list[str]:
    keys: list[str] = json.loads((stage.directory / KEYS).read_text())
    return keys


def students_of(config: RunConfig) -> list[str]:
    """All that a run trains, in order."""
    return [STUDENT, *config.arms, *map(share_name, config.curve)]


def twin_seed(seed: int) -> int:
    """From which the twin of a seed's student is trained."""
    return int(stable_hash([TWIN, seed])[:7], 16)


def share_name(share: float) -> str:
    """The student on a share of the debate's data (`curve`)."""
    return f"{STUDENT}_{share:.0%}".replace("%", "pct")


def _completion_ids(turn: Turn) -> list[int]:
    assert turn.completion is not None, "protocols only return turns that succeeded"
    return turn.completion.ids.tolist()
