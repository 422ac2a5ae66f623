"""The arms of a run: what each learns from, in a run of the smallest size, and how they are named."""

import json
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from test_run import complete, refused
from test_selection import Row, keys, make_row, said

from agentark_jax import arms
from agentark_jax import pipeline as pipeline_module
from agentark_jax.arms import CONTROLS, LEARNED, Judged, check_arms, data_of, label_of, start_of
from agentark_jax.config import RunConfig
from agentark_jax.data.loader import packed_batches
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.pipeline import Pipeline
from agentark_jax.records import Example, Grade, Question
from agentark_jax.results import _contrasts
from agentark_jax.stages import Run, Work, read_manifest
from agentark_jax.tasks.grading import grader
from agentark_jax.traces.config import SelectionConfig, Variant
from agentark_jax.traces.labels import labelled_turns
from agentark_jax.traces.matching import check_matched, within_budget
from agentark_jax.traces.selection import load_selection
from agentark_jax.traces.step_labels import StepLabels, save_step_labels
from agentark_jax.traces.store import TraceStore
from agentark_jax.traces.variants import select
from agentark_jax.training.config import FitConfig
from agentark_jax.training.job import for_steps
from agentark_jax.training.prm_config import PRMConfig
from agentark_jax.verifier import last_answers

ARMS = [
    *("control", "samples", "samples_budget", "vote_filtered", "self_refine", "other_peers", "gold", "answer_only"),
    *("majority", "random", "diverse_k2", "diverse_k2_after_student", "student_after_gold", "dialogue"),
]
RULE = grader("final_answer").id
SWAPPED = {"right": "wrong", "wrong": "right", "unparseable": "unparseable"}
# Questions of one step: the model is right often, and answers to one question are of like lengths.
SETTINGS = (
    *("--task.steps", "[1]", "--task.max_number", "4", "--task.max_value", "8"),
    *("--questions.debate", "150", "--questions.warm_start", "400", "--warm_start.revision_share", "0.4"),
    *("--warm_start.answer.epochs", "16", "--warm_start.revision.epochs", "4", "--debate.temperature", "0.7"),
)


def test_every_variant_is_an_arm_with_words_of_its_own():
    assert set(LEARNED) == set(get_args(Variant))
    for name in (*get_args(Variant), *CONTROLS, *arms.REINFORCED):
        check_arms([name])
        assert arms.ARMS[name].learns
        assert "student" in label_of(name)
    assert len({label_of(name) for name in arms.ARMS}) == len(arms.ARMS)
    reinforced = {"pad", "pad_samples", "pad_outcome", "pad_random", "vr"}
    assert {name for name, arm in arms.ARMS.items() if arm.reinforced} == reinforced
    assert {name for name, arm in arms.ARMS.items() if not arm.generated} == reinforced | {
        "gold",
        "answer_only",
        "twin",
        "planted",
    }
    assert label_of("diverse_k2_after_student") == "diverse_k2 student after debate student"


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["contol"], "there is no 'contol'. Did you mean control"),
        (["control", "control"], "'control' is there already"),
        (["student"], "'student' is there already"),
        (["gold_after_samples"], "starts from 'samples', which must come before it"),
        (["gold", "gold_after_gold_after_gold"], "there is no"),
        (["planted", "twin"], "'planted' has the answers of 'twin', which must come before it"),
        (["twin_after_student"], "twin and planted are checks; nothing starts from another for them"),
        (["twin", "gold_after_twin"], "twin and planted are checks; nothing starts from another for them"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused(names, complaint):
    with pytest.raises(UsageError, match=f"arms: .*{re.escape(complaint)}"):
        check_arms(names)


def test_a_run_refuses_it_before_anything_happens(tmp_path):
    assert "arms: there is no 'placebo'" in refused(tmp_path, "--arms", "[placebo]")
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("arms", [["control"], ["control", "gold", "control_after_gold", "student_after_control"]])
def test_only_what_learned_once_is_called_equal(arms):
    labels = {b: label for a, b, label in _contrasts(RunConfig(arms=arms)) if a == "student" and b in arms}
    assert {name for name, label in labels.items() if label.endswith("at equal questions and tokens")} == {"control"}
    assert set(labels) == set(arms)


@pytest.mark.parametrize("lengths", [[9], [40] * 3, [3, 40, 17, 29, 8] * 4])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_a_fit_takes_the_steps_it_is_given(lengths, steps):
    examples = [
        Example(np.ones(n, np.int32), {"completion": np.ones(n, np.float32)}, f"q{i}", "x", ())
        for i, n in enumerate(lengths)
    ]
    config = for_steps(FitConfig(rows=2, row_length=40, epochs=50, steps=None), examples, steps)
    data = packed_batches(examples, seed=0, epochs=config.epochs, rows=config.rows, row_length=config.row_length)
    assert config.steps == steps <= len(data)
    assert (config.epochs - 1) * sum(lengths) < steps * 2 * 40, "one fewer might not do"


def plain_pipeline(directory: Path, rows: list[Row], **config) -> Pipeline:
    """Only what selection and the order of students need."""
    pipeline = object.__new__(Pipeline)
    pipeline.config = RunConfig(**config)
    pipeline.run = Run(directory)
    pipeline.store = SimpleNamespace(completions=said(rows))
    return pipeline


def spoken_rows(source: str, questions: int, *, longer: int = 0) -> list[Row]:
    """Debates of three agents in two rounds, of which in the end one is wrong; or six samples, two of them wrong."""
    rows = []
    for question in range(questions):
        for index in range(6):
            agent, round = (index % 3, index // 3) if source == "debate" else (0, 0)
            wrong = (agent == question % 3) if source == "debate" else (index in (0, 1))
            length = 10 + (7 * question + 5 * index) % 11 + (longer if round or source != "debate" else 0)
            row = make_row(
                f"q{question:03}",
                agent,
                round,
                "wrong" if wrong else "right",
                ids=[question % 7, index, *range(length)],
                sample=0 if source == "debate" else index,
                answer="3" if wrong else "2",
            )
            rows.append(row)
    return rows


def selected(directory: Path, sources: dict[str, list[Row]], **config) -> dict:
    pipeline = plain_pipeline(directory, [row for rows in sources.values() for row in rows], **config)
    return pipeline.select({source: (source, rows) for source, rows in sources.items()})


def renamed(rows: list[Row], prefix: str) -> list[Row]:
    return [replace(row, key=prefix + row.key) for row in rows]


def test_controls_of_a_selection_are_matched_and_others_have_all(tmp_path):
    debate, samples = spoken_rows("debate", 60), renamed(spoken_rows("samples", 60), "s.")
    sources = {"debate": debate, "samples": samples}
    settings = SelectionConfig(per_question=1, limit=50, seed=3)
    names = ["control", "samples", "samples_budget", "all_correct"]
    chosen = selected(tmp_path, sources, select=settings, arms=[*names, "gold", "control_after_gold"], curve=[0.5])
    assert list(chosen) == ["student", *names, "student_50pct"]
    wanted = [t.question_id for t in chosen["student"].trajectories]
    assert 25 <= len(wanted) == len(set(wanted)) <= 50
    for name in ("control", "samples"):
        assert [t.question_id for t in chosen[name].trajectories] == wanted
    assert {t.round for t in chosen["control"].trajectories} == {0}
    assert {t.round for t in chosen["student"].trajectories} == {1}
    assert {t.turn_key[:2] for t in chosen["samples"].trajectories} == {"s."}
    # Neither the student's limit nor its number of a question's trajectories holds for what is not matched.
    assert len(chosen["all_correct"].trajectories) == 60 * 4
    by_key = {row.key: row for row in samples}
    for question in {row.question_id for row in samples}:
        paid = sum(row.tokens for row in debate if row.question_id == question)
        first: list[Row] = []
        for row in sorted((row for row in samples if row.question_id == question), key=lambda row: row.sample):
            if sum(each.tokens for each in [*first, row]) > paid:
                break
            first.append(row)
        kept = [by_key[t.turn_key] for t in chosen["samples_budget"].trajectories if t.question_id == question]
        assert kept == [row for row in first if row.right]
    matched = read_manifest(tmp_path / "select").counts["matched"]
    assert matched["arms"] == ["student", "control", "samples"]
    assert {t.question_id for t in chosen["student_50pct"].trajectories} < set(wanted)


def test_a_budget_is_the_debates(tmp_path):
    """Samples that are longer than what was said in the debate are fewer."""
    debate, samples = spoken_rows("debate", 9), renamed(spoken_rows("samples", 9, longer=12), "s.")
    chosen = selected(tmp_path, {"debate": debate, "samples": samples}, arms=["samples_budget"])["samples_budget"]
    kept = {row.key for row in within_budget(samples, debate) if row.right}
    assert set(keys(chosen)) == kept < {row.key for row in samples if row.right}


def test_each_control_has_its_source_and_its_choice():
    assert {name: (each.source, each.variant) for name, each in CONTROLS.items() if each.matched} == {
        "control": ("debate", "round1_only"),
        "samples": ("samples", "round1_only"),
        "self_refine": ("self_refine", None),
        "other_peers": ("other_peers", None),
        "hinted": ("hinted", "round1_only"),
        "majority": ("debate", "majority"),
        "random": ("debate", "random"),
        "verifier": ("verified", "all_correct"),
    }


def test_a_draw_from_the_students_own_debate_does_not_follow_the_student(tmp_path):
    """The turns nearest in length to the student's are the student's; what knows no gold answer takes its own."""
    rows = spoken_rows("debate", 90)
    right = {row.key: row.right for row in rows}
    chosen = selected(tmp_path, {"debate": rows}, select=SelectionConfig(per_question=1), arms=["random"])
    count = len(chosen["random"].trajectories)
    assert count == len(chosen["student"].trajectories) >= 45
    assert all(right[key] for key in keys(chosen["student"]))
    assert 0.15 < sum(not right[key] for key in keys(chosen["random"])) / count < 0.55, "one of three is wrong"


def test_a_verifier_decides_in_the_place_of_the_gold_answer(tmp_path):
    """It takes, in its own order, what it calls right of the last round, however the student's lengths are."""
    rows = spoken_rows("debate", 60)
    # Of each question it calls the answers of two agents right, whoever is.
    told = [
        replace(row, verdict="right" if row.agent != (int(row.question_id[1:]) + 1) % 3 else "wrong", answer="")
        for row in last_answers(rows)
    ]
    sources = {"debate": rows, "verified": told}
    chosen = selected(tmp_path / "a", sources, select=SelectionConfig(per_question=1), arms=["verifier"])
    right = {row.key: row.right for row in rows}
    called = {row.key for row in told if row.right}
    found = chosen["verifier"].trajectories
    assert len(found) == len(chosen["student"].trajectories) >= 30
    assert {t.question_id for t in found} == {t.question_id for t in chosen["student"].trajectories}
    assert {t.turn_key for t in found} <= called
    assert 0.3 < sum(not right[t.turn_key] for t in found) / len(found) < 0.7, "of two that it calls right one is wrong"
    first = {row.question_id: row.key for row in reversed(told) if row.right}
    assert all(t.turn_key == first[t.question_id] for t in found)


def test_arms_that_are_not_matched_any_more_are_named_before_anything_is_trained(tmp_path):
    """The match is asserted again of what was stored: of its figures, and of what they are about."""
    rows = spoken_rows("debate", 60)
    chosen = selected(tmp_path, {"debate": rows}, arms=["control", "random"])
    path = tmp_path / "select" / "manifest.json"
    told = json.loads(path.read_text())
    figures = told["counts"]["matched"]
    names = ("student", "control", "random")
    check_matched({name: chosen[name] for name in names}, figures)
    told["counts"]["matched"] = {
        **figures,
        "tokens": {**figures["tokens"], "control": figures["tokens"]["control"] + 9},
    }
    path.write_text(json.dumps(told))
    with pytest.raises(AgentArkError, match=r"The arms student, control, random are not matched.*: control has"):
        selected(tmp_path, {"debate": rows}, arms=["control", "random"])
    kept = chosen["control"].trajectories
    for fewer in (kept[: len(kept) // 2], kept[:-1]):
        arms = {**{name: chosen[name] for name in names}, "control": replace(chosen["control"], trajectories=fewer)}
        tokens = {name: arm.tokens for name, arm in arms.items()}
        with pytest.raises(AgentArkError, match="The arms student, control, random are not matched any more"):
            check_matched(arms, {**figures, "tokens": tokens})


@pytest.mark.parametrize("change", [{"select": SelectionConfig(seed=1)}, {"arms": ["random"]}, {"curve": [0.25]}])
def test_whatever_a_selection_depends_on_makes_it_another(tmp_path, change):
    rows = spoken_rows("debate", 30)
    selected(tmp_path, {"debate": rows}, arms=["control"])
    before = read_manifest(tmp_path / "select").fingerprint
    selected(tmp_path, {"debate": rows}, arms=["control"])
    assert read_manifest(tmp_path / "select").fingerprint == before
    selected(tmp_path, {"debate": rows}, **{"arms": ["control"], **change})
    assert read_manifest(tmp_path / "select").fingerprint != before


def test_students_start_where_they_should_for_as_many_steps(tmp_path):
    rows = spoken_rows("debate", 30)
    arms = ["control", "gold", "diverse_k2", "diverse_k2_after_student", "student_after_gold", "control_after_gold"]
    arms += ["vr", "pad_after_student", "pad_outcome", "pad_random", "student_budget"]
    pipeline = plain_pipeline(tmp_path, rows, arms=arms, curve=[0.5])
    spoken = {source: (source, rows) for source in pipeline.sources()}
    assert list(spoken) == ["debate", "debates"]
    selections = pipeline.select(spoken)
    told = {}

    def distil(name, start, form, learned, questions, *, steps=None):
        told[name] = start, learned, steps
        return SimpleNamespace(name=name, counts={"steps": 11 if name == "student" else 5})

    reinforced = {}

    def reinforce(name, start, form, judge, questions):
        reinforced[name] = start.name, judge, len(questions)
        return SimpleNamespace(name=name, counts={"steps": 3})

    pipeline.distil, pipeline.reinforce = distil, reinforce
    questions = [SimpleNamespace(id=each) for each in sorted({row.question_id for row in rows})]
    judges = {
        Judged(): "a model of the debate",
        Judged(labels="outcome"): "a model of outcomes",
        Judged(labels="random"): "a placebo",
    }
    assert pipeline.judged() == list(judges)
    students = pipeline.distil_all(SimpleNamespace(name="base"), None, selections, judges, questions)
    assert list(students) == ["student", *arms, "student_50pct"]
    assert {name: (start.name, steps) for name, (start, _, steps) in told.items()} == {
        "student": ("base", None),
        "control": ("base", None),
        "gold": ("base", 11),
        "diverse_k2": ("base", 11),
        "diverse_k2_after_student": ("student", 11),
        "student_after_gold": ("gold", None),
        "control_after_gold": ("gold", None),
        "student_50pct": ("base", None),
        "student_budget": ("base", None),
    }
    assert reinforced == {
        "vr": ("base", None, len(questions)),
        "pad_after_student": ("student", "a model of the debate", len(questions)),
        "pad_outcome": ("base", "a model of outcomes", len(questions)),
        "pad_random": ("base", "a placebo", len(questions)),
    }
    assert told["control_after_gold"][1] is selections["control"]
    assert told["student_after_gold"][1] is selections["student"]
    assert told["diverse_k2_after_student"][1] is told["diverse_k2"][1] is selections["diverse_k2"]
    asked = {t.question_id for t in selections["student"].trajectories}
    assert [question.id for question in told["gold"][1]] == sorted(asked)


def judged_run(directory: Path, monkeypatch, arms: list[str], found=None, **prm) -> tuple[dict, dict, list[str]]:
    """The manifests of a run's process reward models and their labels, what each learned, and what was made anew."""
    learned, made = {}, []

    def label_steps(work, config, rows, *_, **__):
        labels = [StepLabels(f"k{turn}", config.labels, tuple(map(float, row))) for turn, row in enumerate(rows)]
        save_step_labels(work.directory / "labels.jsonl", labels)

    def train_prm(work, config, model, prompt, examples, *, labels, seed, display):
        learned[work.directory.name] = labels or config.labels, [each.right for each in examples]
        work.counts["starts from"] = model.name

    monkeypatch.setattr(pipeline_module, "label_steps", label_steps)
    monkeypatch.setattr(pipeline_module, "train_prm", train_prm)
    monkeypatch.setattr(pipeline_module, "step_examples", lambda form, store, labels: (labels, {}))
    pipeline = plain_pipeline(directory, [], arms=arms, prm=PRMConfig(**prm))
    pipeline.run = Run(directory, on_stage=lambda each: None if each.reused else made.append(each.stage))
    pipeline.seed, pipeline.display, pipeline.task = 3, None, SimpleNamespace(grade=None)
    pipeline.generation = SimpleNamespace(release=lambda: None)

    def named(stage, form):
        return SimpleNamespace(name=stage, form=None)

    pipeline.cast = SimpleNamespace(seat=lambda model: None, model=named, judge=named, tokenizers=lambda form: [])
    turns = np.random.default_rng(0).integers(0, 2, (12, 5)).tolist()
    spoken = {source: (f"turns of {source}", turns) for source in pipeline.sources()}
    judges = pipeline.judge_all("base", None, spoken, found)
    return judges, learned, made


def test_each_judge_has_stages_and_labels_of_its_own(tmp_path, monkeypatch):
    arms = ["pad", "pad_samples", "pad_outcome", "pad_random", "vr"]
    judges, learned, made = judged_run(tmp_path, monkeypatch, arms)
    names = [each.stage for each in judges.values()]
    assert names == ["prm", "prm_samples", "prm_outcome", "prm_random"]
    assert made == [stage for name in names for stage in (name.replace("prm", "step_labels"), name)]
    assert {name: source for name, (source, _) in learned.items()} == {
        "prm": "consensus",
        "prm_samples": "consensus",
        "prm_outcome": "outcome",
        "prm_random": "random",
    }
    as_told, placebo = (np.concatenate(learned[name][1]) for name in ("prm", "prm_random"))
    assert as_told.sum() == placebo.sum()
    assert (as_told != placebo).any()
    manifests = {stage: read_manifest(tmp_path / stage) for stage in made}
    assert manifests["step_labels_random"].inputs == {"labels": manifests["step_labels"].fingerprint}
    assert manifests["step_labels_outcome"].config["labels"] == "outcome"
    assert judged_run(tmp_path, monkeypatch, arms)[1:] == ({}, [])


def test_a_placebo_alone_needs_the_labels_that_it_deals(tmp_path, monkeypatch):
    judges, _, made = judged_run(tmp_path, monkeypatch, ["pad_random"])
    assert made == ["step_labels", "step_labels_random", "prm_random"]
    assert list(judges) == [Judged(labels="random")]


def test_stages_of_a_judge_by_the_runs_own_labels_are_what_they_were(tmp_path, monkeypatch):
    """Whatever other judges there are: their manifests' slices, from which fingerprints follow."""
    judged_run(tmp_path, monkeypatch, ["pad", "pad_samples", "pad_random"])
    for suffix, turns in (("", "debate"), ("_samples", "samples")):
        labels, prm = (read_manifest(tmp_path / f"{stage}{suffix}") for stage in ("step_labels", "prm"))
        assert labels.config == {"labels": "consensus", "questions": None, "turns": None}
        assert labels.inputs == {"spoken": f"turns of {turns}", "base": "base"}
        assert prm.config.keys() == {"objective", "frozen", "whole", "seed"}
        assert prm.inputs == {"base": "base", "labels": labels.fingerprint}
        assert labels.version == prm.version == 1


def test_a_judge_of_another_size_starts_from_its_own_model_and_learns_the_same_labels(tmp_path, monkeypatch):
    arms = ["pad", "pad_random"]
    same, _, _ = judged_run(tmp_path, monkeypatch, arms)
    other, _, made = judged_run(tmp_path, monkeypatch, arms, found="the other", model="org/other")
    assert made == ["prm", "prm_random"], "labels are what they were"
    for kind, manifest in other.items():
        assert (same[kind].counts["starts from"], manifest.counts["starts from"]) == ("base", "the other")
        assert manifest.inputs == {**same[kind].inputs, "base": "the other"}
        assert manifest.config == same[kind].config


def test_two_arms_that_would_be_one_are_refused():
    with pytest.raises(UsageError, match=r"prm\.labels is outcome, so pad and pad_outcome of arms are one"):
        RunConfig(arms=["pad", "pad_outcome"], prm=PRMConfig(labels="outcome"))


def test_pad_is_compared_with_all_that_it_might_owe_its_gain_to():
    beside = ["student_budget", "vr", "pad_samples", "pad_outcome", "pad_random"]
    found = [b for a, b, _ in _contrasts(RunConfig(arms=["pad", *beside])) if a == "pad"]
    assert set(found) == {"base", "student", *beside}


def test_what_its_grader_cannot_read_is_not_learned_and_all_of_it_is_an_error(tmp_path):
    grades = {"The answer is 2.": "right", "Two.": "unparseable"}
    pipeline = object.__new__(Pipeline)
    pipeline.task = SimpleNamespace(
        grader_id="strict-1", grade=lambda question, text: Grade(grades.get(text, "unparseable"))
    )
    form = SimpleNamespace(question=lambda question: ((1, 2),), response=lambda text: (len(text), 0))
    questions = [Question.make("task", "debate", text, "2.", text) for text in ("Two.", "Deux.")]
    work = Work(tmp_path)
    examples = pipeline._written(work, "answer_only", questions, form)
    assert [example.ids.tolist() for example in examples] == [[1, 2, 16, 0]] * 2
    assert work.counts == {"unreadable": 0}
    with pytest.raises(AgentArkError, match=r"strict-1 can read none of the 2 texts that gold would learn.*'Two\.'"):
        pipeline._written(work, "gold", questions, form)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("arms")
    complete(root, *SETTINGS, "--arms", f"[{', '.join(ARMS)}]")
    return root / "tiny"


def manifest(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "manifest.json").read_text())


@pytest.mark.slow
def test_controls_have_the_questions_and_tokens_of_the_student(run):
    counts = manifest(run, "select")["counts"]
    matched = counts["matched"]
    controls = [name for name in ARMS if name in CONTROLS and CONTROLS[name].matched]
    assert matched["arms"] == ["student", *controls]
    student = load_selection(run / "select" / "student.parquet")
    wanted = [t.question_id for t in student.trajectories]
    for name in controls:
        selection = load_selection(run / "select" / f"{name}.parquet")
        assert [t.question_id for t in selection.trajectories] == wanted
        assert abs(selection.tokens - student.tokens) <= 0.01 * min(selection.tokens, student.tokens)
        assert matched["lengths"][name]["p"] >= 0.05 or matched["lengths"][name]["distance"] <= 0.05
        fitted = manifest(run, name)["counts"]
        assert fitted["loss_tokens"] == 2 * selection.tokens  # epochs
        assert abs(fitted["steps"] - manifest(run, "student")["counts"]["steps"]) <= 1


@pytest.mark.slow
def test_arms_that_are_not_matched_take_as_many_steps(run):
    steps = manifest(run, "student")["counts"]["steps"]
    for name in ("samples_budget", "gold", "answer_only", "diverse_k2", "diverse_k2_after_student"):
        assert manifest(run, name)["counts"]["steps"] == steps
        described = json.loads((run / "results.json").read_text())["arms"][name]["description"]
        assert "not matched in volume" in described


@pytest.mark.slow
def test_each_arm_learns_from_what_its_name_says(run):
    def keys(stage: str) -> list[str]:
        return json.loads((run / stage / "keys.json").read_text())

    def chosen(name: str) -> list:
        selection = load_selection(run / "select" / f"{name}.parquet")
        wanted = [t.turn_key for t in selection.trajectories]
        turns = {turn.key: turn for turn in store.turns(keys=wanted)}
        return [turns[key] for key in wanted]

    with TraceStore(run / "traces.sqlite", read_only=True) as store:
        every = {turn.key: turn for turn in store.turns(errors=False)}
        labels = store.labels(RULE)
        assert {turn.call.protocol for turn in chosen("samples")} == {"samples"}
        assert all(labels[turn.key].verdict == "right" and not turn.call.parents for turn in chosen("samples"))
        refined = [every[key] for key in keys("turns_self_refine")]
        assert {len(turn.call.parents) for turn in refined} == {0, 1}
        for turn in refined:
            assert all(every[parent].call.agent == turn.call.agent for parent in turn.call.parents)
        misled = [turn for key in keys("turns_other_peers") if (turn := every[key]).call.round == 1]
        for turn in misled:
            about = {every[parent].call.question_id for parent in turn.call.parents[1:]}
            assert len(about) == 1
            assert turn.call.question_id not in about
        debate, samples = (labelled_turns(store, RULE, keys=keys(stage)) for stage in ("debate", "turns_samples"))
        paid = {row.key for row in within_budget(samples, debate) if row.right}
        assert {turn.key for turn in chosen("samples_budget")} <= paid
        # No gold answer decides: were right wrong and wrong right, the same turns would be there to choose from.
        for name, rows in (("vote_filtered", samples), ("majority", debate), ("random", debate)):
            assert {labels[turn.key].verdict for turn in chosen(name)} <= {"right", "wrong"}
            swapped = [replace(row, verdict=SWAPPED[row.verdict]) for row in rows]
            whole = SelectionConfig(variant=CONTROLS[name].variant, per_question=None)
            there = {t.turn_key for t in select(swapped, whole, store.completions).trajectories}
            assert {turn.key for turn in chosen(name)} <= there


@pytest.mark.slow
def test_gold_and_answers_are_those_of_the_students_questions(run):
    asked = {t.question_id for t in load_selection(run / "select" / "student.parquet").trajectories}
    assert (
        manifest(run, "gold")["counts"]["examples"] == manifest(run, "answer_only")["counts"]["examples"] == len(asked)
    )
    assert manifest(run, "answer_only")["counts"]["loss_tokens"] < manifest(run, "gold")["counts"]["loss_tokens"]
    assert manifest(run, "gold")["counts"]["unreadable"] == 0


@pytest.mark.slow
def test_an_arm_goes_on_from_anothers_student(run):
    assert manifest(run, "diverse_k2_after_student")["inputs"]["base"] == manifest(run, "student")["fingerprint"]
    assert manifest(run, "student_after_gold")["inputs"]["base"] == manifest(run, "gold")["fingerprint"]
    assert manifest(run, "diverse_k2")["inputs"]["base"] == manifest(run, "base")["fingerprint"]
    assert manifest(run, "diverse_k2")["config"]["weighting"] == "questions"
    # Students are equal only where they started from the same weights and learned the same. (What agents said may be
    # the task's own rationale, word for word.)
    origins = {
        name: (revision(run, start_of(name) or "base"), learned(run, name))
        for name in ("student", *ARMS)
        if name not in ("gold", "answer_only")
    }
    for one, other in combinations(origins, 2):
        if origins[one] != origins[other]:
            assert revision(run, one) != revision(run, other), (one, other)
    assert revision(run, "gold") != revision(run, "answer_only")


def revision(run: Path, stage: str) -> str:
    return manifest(run, stage)["counts"]["revision"]


def learned(run: Path, name: str) -> frozenset:
    """What a student learned, whatever the order: questions with token ids."""
    selection = load_selection(run / "select" / f"{data_of(name)}.parquet")
    return frozenset((t.question_id, tuple(t.completion_ids.tolist())) for t in selection.trajectories)


@pytest.mark.slow
def test_every_arm_is_in_the_table_and_nothing_is_done_twice(run):
    results = json.loads((run / "results.json").read_text())
    contrasts = {frozenset((each["a"], each["b"])) for each in results["differences"]}
    for name in ARMS:
        assert results["arms"][name]["n"] == 16
        assert {frozenset(("student", name)), frozenset((name, "base"))} <= contrasts
    assert "Everything was up to date" in complete(run.parent, *SETTINGS, "--arms", f"[{', '.join(ARMS)}]")
    fewer = ", ".join(ARMS[:2])
    shown = complete(run.parent, *SETTINGS, "--arms", f"[{fewer}]", "--update")
    assert "warm_start_answers" in shown
    assert set(json.loads((run / "results.json").read_text())["arms"]) == {
        *("base", "vote", "debate", "student", "control", "samples", "student_50pct"),
    }
