"""A verifier in the place of the grader: what it is asked, what it may not know, what a kill leaves of it."""

from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from prm_models import TASK, spoiled, turn_of
from rich.console import Console
from scripted import Killed, ScriptedEngine
from test_arms import plain_pipeline

from agentark_jax.engines.base import TooLong
from agentark_jax.errors import AgentArkError
from agentark_jax.progress import Display
from agentark_jax.stages import Work
from agentark_jax.traces.labels import grade_turns, labelled_turns
from agentark_jax.traces.store import TraceStore
from agentark_jax.verifier import last_answers, verify

QUESTIONS = TASK.questions("debate", 5)


@pytest.fixture
def store(form, tmp_path):
    """Two agents answer each question twice: the first is right in the end, the second slips. A third cannot be read,
    and a judge speaks last."""
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_questions(QUESTIONS)
        for question in QUESTIONS:
            wrong = spoiled(question, 1)
            for round, texts in enumerate(((wrong, wrong), (question.rationale, wrong))):
                for agent, text in enumerate(texts):
                    store.record(turn_of(form, question, text, agent, round=round))
            store.record(turn_of(form, question, "It must be seven.", 3, round=1))
            store.record(turn_of(form, question, "The first.", 2, round=1, role="judge"))
        questions = {question.id: question for question in QUESTIONS}
        store.put_labels(grade_turns(store.turns(), questions, TASK.grade, TASK.grader_id))
        yield store


class Verifier(ScriptedEngine):
    """Takes every answer for right but those to one question."""

    def __init__(self, form, **options):
        super().__init__(form, self.say, **options)

    def say(self, prompt, sampling):
        assert sampling.temperature == 0
        return "false" if QUESTIONS[0].prompt in prompt else "true"


class Engines:
    def __init__(self):
        self.contexts = []

    @asynccontextmanager
    async def engine(self, seat, context):
        self.contexts.append(context)
        yield seat.engine


def asked(directory, store, engine, engines=None):
    directory.mkdir(exist_ok=True)
    work = Work(directory)
    seat = SimpleNamespace(model=SimpleNamespace(form=engine.form), engine=engine)
    rows = last_answers(labelled_turns(store, TASK.grader_id))
    verify(work, rows, store, generation=engines or Engines(), seat=seat, display=Display(Console(quiet=True)))
    return work


def test_it_is_asked_of_last_answers_and_told_no_right_one(form, store, tmp_path):
    engine, engines = Verifier(form), Engines()
    work = asked(tmp_path / "v", store, engine, engines)
    assert len(engine.prompts) == work.counts["turns"] == 10
    for prompt in engine.prompts:
        question = next(each for each in QUESTIONS if each.prompt in prompt)
        before, solution = prompt.split("Solution:")
        assert f"The answer is {question.answer}." not in before
        assert solution.count("The answer is") == 1
        assert "The first." not in prompt
        assert "It must be" not in prompt
    assert max(len(form.tokenizer.encode(prompt)) for prompt in engine.prompts) <= engines.contexts[0]
    counts = {key: work.counts[key] for key in ("right", "wrong", "unparseable", "too_long")}
    assert counts == {"right": 8, "wrong": 2, "unparseable": 0, "too_long": 0}
    assert work.counts["agreement"] == {"both_right": 4, "first_right": 4, "second_right": 1, "both_wrong": 1}
    assert work.tokens > sum(len(form.tokenizer.encode(prompt)) for prompt in engine.prompts)
    gold = last_answers(labelled_turns(store, TASK.grader_id))
    said = labelled_turns(store, work.counts["grader"], keys=[row.key for row in gold])
    assert {row.key: row.verdict for row in said} == {
        row.key: "wrong" if row.question_id == QUESTIONS[0].id else "right" for row in gold
    }
    # Whatever the grader says, it is asked the same.
    others = Verifier(form)
    assert asked(tmp_path / "v", store, others).counts == work.counts
    assert others.prompts == []


def test_a_stage_that_was_killed_asks_only_for_what_is_missing(form, store, tmp_path):
    class OneByOne(Verifier):
        async def generate(self, request):
            if len(self.prompts) == 4:
                raise Killed
            return await super().generate(request)

    killed = OneByOne(form)
    with pytest.raises(Killed):
        asked(tmp_path / "v", store, killed)
    (grader,) = set(store.graders()) - {TASK.grader_id}
    kept = len(store.labels(grader))
    assert 0 < kept <= 4
    engine = Verifier(form)
    work = asked(tmp_path / "v", store, engine)
    assert len(engine.prompts) == 10 - kept
    assert (work.counts["right"], work.counts["wrong"]) == (8, 2)


def test_what_it_has_no_room_for_is_not_right(form, store, tmp_path):
    class Narrow(Verifier):
        async def generate(self, request):
            if QUESTIONS[1].prompt in self.form.tokenizer.decode(request.prompt_ids.tolist()):
                raise TooLong("no room")
            return await super().generate(request)

    work = asked(tmp_path / "v", store, Narrow(form))
    assert (work.counts["right"], work.counts["unparseable"], work.counts["too_long"]) == (6, 2, 2)


def run_of(directory, store, engine):
    pipeline = plain_pipeline(directory, [], arms=["verifier"])
    pipeline.store, pipeline.generation = store, Engines()
    pipeline.display = Display(Console(quiet=True))
    seat = SimpleNamespace(model=SimpleNamespace(form=engine.form), engine=engine)
    pipeline.cast = SimpleNamespace(seat=lambda model: seat, model=lambda stage, form: None)
    assert pipeline.sources() == ["debate", "verified"]
    return pipeline.verify("base", engine.form, "debate", labelled_turns(store, TASK.grader_id))


def test_its_verdicts_stand_in_the_place_of_the_graders(form, store, tmp_path):
    stage, rows = run_of(tmp_path / "run", store, Verifier(form))
    assert stage.stage == "verdicts"
    gold = last_answers(labelled_turns(store, TASK.grader_id))
    assert [row.place for row in rows] == [row.place for row in gold]
    assert sum(row.right for row in rows) == 8
    assert sum(row.right for row in gold) == 5
    again, same = run_of(tmp_path / "run", store, Verifier(form, kill_at=0))
    assert again.reused
    assert same == rows


def test_one_that_calls_nothing_right_is_an_error(form, store, tmp_path):
    class Stern(Verifier):
        def say(self, prompt, sampling):
            return "false"

    complaint = r"of 10 last-round answers it calls none right \(10 wrong, 0 unparseable, 0 too_long\)\. Leave verifier"
    with pytest.raises(AgentArkError, match=complaint):
        run_of(tmp_path / "run", store, Stern(form))
    with pytest.raises(AgentArkError, match=complaint):  # nobody is asked again
        run_of(tmp_path / "run", store, Stern(form, kill_at=0))


def test_the_last_round_is_that_of_each_question(form, store):
    rows = labelled_turns(store, TASK.grader_id)
    early = [row for row in rows if row.question_id != QUESTIONS[0].id or row.round == 0]
    assert {row.round for row in last_answers(early) if row.question_id == QUESTIONS[0].id} == {0}
    assert {row.round for row in last_answers(early) if row.question_id != QUESTIONS[0].id} == {1}
    assert {row.role for row in last_answers([*rows, replace(rows[0], role="summariser", round=5)])} == {"debater"}
