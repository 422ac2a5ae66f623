"""Labels of the steps of debates as a stage: kept as they are paid for, and paid for once."""

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from prm_models import TASK, spoiled, turn_of
from rich.console import Console
from scripted import Killed, ScriptedEngine

from agentark_jax.data.render import PlainFormat
from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.engines.base import TooLong
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.process import LABELS, PAID, Journal, deal_labels, label_steps, step_examples
from agentark_jax.progress import Display
from agentark_jax.protocols.calls import Draw
from agentark_jax.stages import Work
from agentark_jax.traces.labels import grade_turns, labelled_turns
from agentark_jax.traces.step_labels import StepJudge, StepLabels, dealt, load_step_labels
from agentark_jax.traces.store import TraceStore
from agentark_jax.training.prm_config import PRMConfig

QUESTIONS = TASK.questions("debate", 4)
CONFIG = PRMConfig(coefficients={"cross_entropy": 1.0}, continuations=2)


@pytest.fixture
def store(form, tmp_path):
    """Three agents answer each question: two are right in the same words, the third slips in the second step."""
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_questions(QUESTIONS)
        for question in QUESTIONS:
            for agent in range(3):
                text = spoiled(question, 1) if agent == 2 else question.rationale
                store.record(turn_of(form, question, text, agent))
        questions = {question.id: question for question in QUESTIONS}
        store.put_labels(grade_turns(store.turns(), questions, TASK.grade, TASK.grader_id))
        yield store


class Speaker(ScriptedEngine):
    """Goes on to the right answer from where nothing is wrong, once in `of` times also from elsewhere. One by one."""

    def __init__(self, form, of=1000, **options):
        super().__init__(form, self.say, **options)
        self.of, self.calls, self.turn = of, 0, asyncio.Lock()

    async def generate(self, request):
        async with self.turn:
            return await super().generate(request)

    def say(self, prompt, sampling):
        self.calls += 1
        question = next(each for each in QUESTIONS if each.prompt in prompt)
        said = prompt.split("Answer:")[-1].strip().splitlines()
        good = said == question.rationale.splitlines()[: len(said)]
        return f"The answer is {question.answer if good or self.calls % self.of == 0 else 'nothing'}."


class Judge(ScriptedEngine):
    """Takes each step for right that is in the gold rationale."""

    def __init__(self, form, **options):
        super().__init__(form, self.say, **options)

    def say(self, prompt, sampling):
        question = next(each for each in QUESTIONS if each.prompt in prompt)
        last = prompt.split("Last step:")[-1].split("\n\nThat was")[0]
        return "true" if last.strip() in question.rationale.splitlines() else "false"


class Engines:
    """Stands for `Generation`: enters the engine of a seat, and remembers the contexts that were wanted."""

    def __init__(self):
        self.contexts, self.released = [], 0

    @asynccontextmanager
    async def engine(self, seat, context):
        self.contexts.append(context)
        yield seat.engine

    def release(self):
        self.released += 1


def seat(engine):
    return SimpleNamespace(model=SimpleNamespace(form=engine.form), engine=engine)


def label(directory, store, form, source, speaker=None, judge=None, engines=None, **changes):
    directory.mkdir(exist_ok=True)
    work = Work(directory)
    found = label_steps(
        work,
        replace(CONFIG, labels=source, **changes),
        labelled_turns(store, TASK.grader_id),
        store,
        grade=TASK.grade,
        draw=Draw(1.0, 32),
        seed=5,
        generation=engines or Engines(),
        display=Display(Console(quiet=True)),
        tokenizers=[form.tokenizer],
        speaker=speaker and seat(speaker),
        judge=judge and seat(judge),
    )
    assert load_step_labels(directory / LABELS) == found == sorted(found, key=lambda each: each.key)
    return found, work


def by_agent(store, found):
    """Labels by the place of the question and the agent."""
    numbers = {question.id: number for number, question in enumerate(QUESTIONS)}
    places = {turn.key: (numbers[turn.call.question_id], turn.call.agent) for turn in store.turns()}
    return {places[each.key]: each for each in found}


def test_free_sources_cost_nothing_and_write_what_they_say(form, store, tmp_path):
    for source, slips in (("consensus", [0, 0, 0, 0]), ("debate", None)):
        found, work = label(tmp_path / source, store, form, source)
        said = by_agent(store, found)
        assert all(set(said[question, agent].right) == {1.0} for question in range(4) for agent in (0, 1))
        if slips:
            assert [said[question, 2].first_error for question in range(4)] == slips
        assert (work.tokens, work.counts["tokens"], work.counts["turns"]) == (0, 0, 12)
        assert work.counts["labelled"] == len(found)
        assert work.counts["right"] + work.counts["wrong"] == sum(len(each.right) for each in found)
        assert not (tmp_path / source / PAID).exists()


def test_outcome_labels_are_the_verdicts_on_whole_answers(form, store, tmp_path):
    unreadable = turn_of(form, QUESTIONS[0], "1+1=2\nso be it", agent=3)
    store.record(unreadable)
    questions = {question.id: question for question in QUESTIONS}
    store.put_labels(grade_turns([unreadable], questions, TASK.grade, TASK.grader_id))
    found, work = label(tmp_path / "o", store, form, "outcome")
    verdicts = {row.key: row.verdict for row in labelled_turns(store, TASK.grader_id)}
    assert verdicts[unreadable.key] == "unparseable"
    assert {each.key: set(each.right) for each in found} == {
        key: {float(verdict == "right")} for key, verdict in verdicts.items()
    }
    assert (work.tokens, work.counts["labelled"], work.counts["turns"]) == (0, 13, 13)


def test_dealt_labels_keep_their_numbers_and_not_their_places(form, store, tmp_path):
    _, work = label(tmp_path / "c", store, form, "continuations", Speaker(form, of=3))
    told = load_step_labels(tmp_path / "c" / LABELS)
    drawn = {}
    for seed in (1, 1, 2):
        placebo = Work(tmp_path / f"dealt{seed}")
        placebo.directory.mkdir(exist_ok=True)
        deal_labels(placebo, tmp_path / "c" / LABELS, seed)
        found = load_step_labels(placebo.directory / LABELS)
        assert found == drawn.setdefault(seed, found)
        for name in ("labelled", "right", "wrong"):
            assert placebo.counts[name] == work.counts[name] > 0
        assert placebo.tokens == 0
        values, others = ([right for each in labels for right in each.right] for labels in (told, found))
        assert sorted(values) == sorted(others)
        assert values != others
        assert [(each.key, len(each.right)) for each in found] == [(each.key, len(each.right)) for each in told]
    assert drawn[1] != drawn[2]


def test_what_is_dealt_says_nothing_of_what_it_was():
    """Over many steps: the chance that a right step stays right is the share of right ones."""
    told = [StepLabels(f"k{turn:03}", "s", (float(turn % 4 > 0),) * 5) for turn in range(400)]
    found = [right for each in dealt(told, 0) for right in each.right]
    kept = [now for now, before in zip(found, (r for each in told for r in each.right), strict=True) if before]
    assert sum(found) == len(kept) == 1500
    assert 0.72 < sum(kept) / len(kept) < 0.78
    assert sum(len(set(each.right)) > 1 for each in dealt(told, 0)) > 200, "steps of one answer go apart"


def test_continuations_find_the_step_and_equal_beginnings_are_paid_for_once(form, store, tmp_path):
    speaker, engines = Speaker(form), Engines()
    found, work = label(tmp_path / "c", store, form, "continuations", speaker, engines=engines)
    said = by_agent(store, found)
    for (_, agent), each in said.items():
        assert each.first_error == (1 if agent == 2 else None)
        assert each.source == "continuations"
    beginnings = sum(len(question.meta["values"]) + len(question.meta["values"]) - 1 for question in QUESTIONS)
    assert len(speaker.prompts) == 2 * beginnings, "twice what is distinct: the first step of all three is the same"
    # Of two turns that say the same, one bears the cost.
    assert all(sorted(said[number, agent].tokens > 0 for agent in (0, 1)) == [False, True] for number in range(4))
    spent = sum(len(form.tokenizer.encode(prompt)) for prompt in speaker.prompts)
    assert work.tokens == sum(each.tokens for each in found) > spent
    assert max(len(form.tokenizer.encode(prompt)) for prompt in speaker.prompts) + 32 <= engines.contexts[0] + 2

    # Again: nothing is asked, everything is the same.
    idle = Speaker(form, kill_at=0)
    again, other = label(tmp_path / "c", store, form, "continuations", idle)
    assert (again, other.counts, idle.prompts) == (found, work.counts, [])


def test_a_stage_that_was_killed_asks_only_for_what_is_missing(form, store, tmp_path):
    expected, _ = label(tmp_path / "whole", store, form, "continuations", Speaker(form))
    total = len((tmp_path / "whole" / PAID).read_text().splitlines())
    directory = tmp_path / "killed"
    for kill_at in (9, 11):
        engine = Speaker(form, kill_at=kill_at)
        with pytest.raises(Killed):
            label(directory, store, form, "continuations", engine)
    kept = (directory / PAID).read_text().splitlines()
    assert 0 < len(kept) < total
    with (directory / PAID).open("a") as file:
        file.write('["half of a li')
    engine = Speaker(form)
    found, _ = label(directory, store, form, "continuations", engine)
    assert found == expected
    assert len(engine.prompts) == 2 * (total - len(kept))
    assert sorted((directory / PAID).read_text().splitlines()) == sorted(
        (tmp_path / "whole" / PAID).read_text().splitlines()
    )


def test_soft_labels_are_shares_and_hard_ones_what_may_be(form, store, tmp_path):
    soft, _ = label(tmp_path / "soft", store, form, "continuations", Speaker(form, of=2))
    hard, _ = label(tmp_path / "hard", store, form, "continuations", Speaker(form, of=2), hard=True)
    values = {right for each in soft for right in each.right}
    assert 0.5 in values
    assert [tuple(float(right > 0) for right in each.right) for each in soft] == [each.right for each in hard]


def test_a_judge_is_asked_once_of_equal_answers(form, store, tmp_path):
    judge, engines = Judge(form), Engines()
    found, work = label(tmp_path / "j", store, form, "judge", judge=judge, engines=engines)
    said = by_agent(store, found)
    assert {(agent, each.first_error) for (_, agent), each in said.items()} == {(0, None), (1, None), (2, 1)}
    steps = sum(1 + len(question.meta["values"]) for question in QUESTIONS)
    assert len(judge.prompts) == steps + 2 * len(QUESTIONS), "up to the first that is wrong"
    assert max(len(form.tokenizer.encode(prompt)) for prompt in judge.prompts) <= engines.contexts[0]
    assert work.tokens == sum(each.tokens for each in found) > 0
    idle = Judge(form, kill_at=0)
    assert label(tmp_path / "j", store, form, "judge", judge=idle)[0] == found


def test_a_judge_that_had_no_room_says_nothing_and_is_not_asked_again(form, store, tmp_path):
    class Small(Judge):
        async def generate(self, request):
            await super().generate(request)
            raise TooLong("no room")

    judge = Small(form)
    found, work = label(tmp_path / "j", store, form, "judge", judge=judge)
    assert (found, work.counts["labelled"], work.counts["turns"]) == ([], 0, 12)
    assert len(judge.prompts) == 8
    assert label(tmp_path / "j", store, form, "judge", judge=Judge(form, kill_at=0))[0] == []


def test_what_both_agree_on(form, store, tmp_path):
    class Strict(Judge):
        def say(self, prompt, sampling):
            return "false" if QUESTIONS[0].prompt in prompt else super().say(prompt, sampling)

    engines = Engines()
    found, work = label(tmp_path / "a", store, form, "agreed", Speaker(form), Strict(form), engines)
    said = by_agent(store, found)
    assert {question for question, _ in said} == {1, 2, 3}
    assert {(agent, each.first_error) for (_, agent), each in said.items()} == {(0, None), (1, None), (2, 1)}
    assert work.tokens > 0
    assert engines.released == 1


def test_few_answers_to_few_questions_are_labelled_but_the_consensus_is_that_of_all(form, store, tmp_path):
    everything, _ = label(tmp_path / "all", store, form, "consensus")
    few, work = label(tmp_path / "few", store, form, "consensus", questions=2, turns=2)
    assert len(few) == work.counts["turns"] == 4
    assert set(few) <= set(everything)
    assert len({question for question, _ in by_agent(store, few)}) == 2


def test_turns_of_other_tokenizers_are_counted(form, store, tmp_path):
    directory = tmp_path / "other"
    directory.mkdir()
    train_tokenizer(["some other words"], 300, directory)
    other = PlainFormat(Tokenizer(directory))
    turn = turn_of(other, QUESTIONS[0], QUESTIONS[0].rationale, agent=7)
    store.record(turn)
    store.put_labels(grade_turns([turn], {QUESTIONS[0].id: QUESTIONS[0]}, TASK.grade, TASK.grader_id))
    found, work = label(tmp_path / "c", store, form, "continuations", Speaker(form))
    assert (len(found), work.counts["other_tokenizer"], work.counts["not_continued"]) == (12, 1, 0)
    # Known, but not the speaker's own: it cannot go on from such tokens.
    directory = tmp_path / "d"
    directory.mkdir()
    work = Work(directory)
    label_steps(
        work,
        replace(CONFIG, labels="continuations"),
        labelled_turns(store, TASK.grader_id),
        store,
        grade=TASK.grade,
        draw=Draw(1.0, 32),
        seed=5,
        generation=Engines(),
        display=Display(Console(quiet=True)),
        tokenizers=[form.tokenizer, other.tokenizer],
        speaker=seat(Speaker(form)),
    )
    assert (work.counts["other_tokenizer"], work.counts["not_continued"], work.counts["labelled"]) == (0, 1, 12)


def test_examples_of_labels(form, store, tmp_path):
    found, _ = label(tmp_path / "c", store, form, "continuations", Speaker(form))
    examples, counts = step_examples(form, store, found)
    assert [example.trace_keys for example in examples] == [(each.key,) for each in found]
    for example, each in zip(examples, found, strict=True):
        np.testing.assert_array_equal(example.step_labels, np.float32(each.right))
    assert counts["retokenised_apart"] == 0
    assert (counts["answers"], counts["questions"], counts["contrasted"]) == (12, 4, 4)
    with pytest.raises(AgentArkError, match=r"of 0 turns with labels none .* prm\.labels"):
        step_examples(form, store, [])


def test_a_journal_keeps_what_it_was_told_and_names_what_is_damaged(tmp_path):
    bar = SimpleNamespace(set=lambda *position: None)
    path = tmp_path / PAID

    async def fail():
        raise AgentArkError("no server")

    async def say():
        return [1, None]

    journal = Journal(path, bar)
    with pytest.raises(AgentArkError, match="no server"):
        asyncio.run(journal.answer("a", fail))
    assert asyncio.run(journal.answer("a", say)) == [1, None]
    journal.close()
    journal = Journal(path, bar)
    assert asyncio.run(journal.answer("a", fail)) == [1, None]
    journal.close()
    path.write_text('["a", 1]\nnonsense\n["b", 2]\n')
    with pytest.raises(AgentArkError, match=r"paid\.jsonl, line 2: damaged"):
        Journal(path, bar)


def test_files_that_are_no_labels(tmp_path):
    path = tmp_path / LABELS
    for row in ({"key": "a"}, {"key": "a", "source": "s", "right": [2.0], "tokens": 0}, {"right": 3}):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(UsageError, match=r"labels\.jsonl .*line 1.* make them anew"):
            load_step_labels(path)
    path.write_text("")
    assert load_step_labels(path) == []


def test_the_room_that_a_judge_needs(form):
    texts = ["3+4=7\n", "The answer is 7."]
    judge = Judge(form)
    asyncio.run(StepJudge(judge, form).labels("k", QUESTIONS[0], [QUESTIONS[0].rationale.splitlines()[0], texts[1]]))
    longest = max(len(form.tokenizer.encode(prompt)) for prompt in judge.prompts)
    room = StepJudge.length(form, QUESTIONS[0], [QUESTIONS[0].rationale.splitlines()[0], texts[1]])
    assert longest <= room <= longest + 40
