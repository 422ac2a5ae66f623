"""Control flow of the protocols against a scripted engine; every call kept and never paid for twice."""

import asyncio
from itertools import pairwise

import pytest
from scripted import ScriptedEngine
from test_engine import make_engine

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.protocols.calls import Caller, Draw
from agentark_jax.protocols.config import DebateConfig
from agentark_jax.protocols.debate import debate
from agentark_jax.protocols.single import answer
from agentark_jax.records import Question
from agentark_jax.traces.store import TraceStore

QUESTION = Question.make("task", "debate", "How many?", "7")
OTHER = Question.make("task", "debate", "How few?", "1")


@pytest.fixture
def store(tmp_path):
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_questions([QUESTION, OTHER])
        yield store


def numbered(prompt, sampling):
    """A different answer for every call: its seed."""
    return f"The answer is {sampling.seed % 1000}."


def test_debate_rounds_see_the_round_before_own_answer_first(form, store):
    engine = ScriptedEngine(form, numbered)
    rounds = asyncio.run(debate(QUESTION, Caller(engine, store, form, seed=0), DebateConfig(agents=3, rounds=3)))
    assert [[turn.call.agent for turn in turns] for turns in rounds] == [[0, 1, 2]] * 3
    assert [{turn.call.round for turn in turns} for turns in rounds] == [{0}, {1}, {2}]
    for before, after in pairwise(rounds):
        texts = [turn.completion.text for turn in before]
        for agent, turn in enumerate(after):
            peers = [text for index, text in enumerate(texts) if index != agent]
            expected = f"Question: How many?\nMy answer:\n{texts[agent]}\n"
            expected += "\n".join(f"Another answer:\n{text}" for text in peers) + "\nBetter answer:"
            assert form.tokenizer.decode(turn.call.prompt_ids.tolist()) == expected
            assert turn.call.parents == (
                before[agent].key,
                *(turn.key for index, turn in enumerate(before) if index != agent),
            )
    assert len({turn.call.sampling.seed for turns in rounds for turn in turns}) == 9


def test_one_agent_alone_revises_its_own_answer(form, store):
    engine = ScriptedEngine(form, numbered)
    rounds = asyncio.run(debate(QUESTION, Caller(engine, store, form, seed=0), DebateConfig(agents=1, rounds=2)))
    assert "Another answer" not in form.tokenizer.decode(rounds[1][0].call.prompt_ids.tolist())


def test_a_repeated_run_asks_nothing_and_a_longer_one_only_the_new_round(form, store):
    engine = ScriptedEngine(form, numbered)
    caller = Caller(engine, store, form, seed=0)
    first = asyncio.run(debate(QUESTION, caller, DebateConfig(rounds=2)))
    assert len(engine.prompts) == 6
    again = asyncio.run(debate(QUESTION, caller, DebateConfig(rounds=2)))
    assert len(engine.prompts) == 6
    assert [[turn.key for turn in turns] for turns in again] == [[turn.key for turn in turns] for turns in first]
    asyncio.run(debate(QUESTION, caller, DebateConfig(rounds=3)))
    assert len(engine.prompts) == 9


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"weights": "w1"},
        {"model": "another"},
        {"temperature": 0.5},
        {"max_tokens": 9},
    ],
)
def test_whatever_determines_a_call_makes_it_another_call(form, store, change):
    engine = ScriptedEngine(form, numbered)
    draw = {"temperature": 0.8, "max_tokens": 8}
    asyncio.run(answer(QUESTION, Caller(engine, store, form, seed=0), Draw(**draw), protocol="single"))
    for key in ("weights", "model"):
        setattr(engine, key, change.get(key, getattr(engine, key)))
    draw.update({key: change[key] for key in draw if key in change})
    caller = Caller(engine, store, form, seed=change.get("seed", 0))
    asyncio.run(answer(QUESTION, caller, Draw(**draw), protocol="single"))
    assert len(engine.prompts) == 2


def test_samples_and_questions_have_seeds_of_their_own(form, store):
    caller = Caller(ScriptedEngine(form, numbered), store, form, seed=0)
    draw = Draw(0.8, 8)
    turns = asyncio.run(answer(QUESTION, caller, draw, samples=4, protocol="single"))
    turns += asyncio.run(answer(OTHER, caller, draw, samples=4, protocol="single"))
    assert len({turn.call.sampling.seed for turn in turns}) == 8
    assert all(0 <= turn.call.sampling.seed < 2**64 for turn in turns)


def test_a_failed_call_is_kept_as_an_attempt_and_tried_again(form, store):
    caller = Caller(ScriptedEngine(form, numbered, fail_on={0}), store, form, seed=0)
    with pytest.raises(AgentArkError, match="went away"):
        asyncio.run(answer(QUESTION, caller, Draw(0.8, 8), protocol="single"))
    (failed,) = store.turns()
    assert (failed.attempt, failed.completion, failed.error) == (0, None, "the server went away")
    (turn,) = asyncio.run(answer(QUESTION, caller, Draw(0.8, 8), protocol="single"))
    assert turn.attempt == 1
    assert turn.key == failed.key
    assert store.lookup(turn.key).completion.text == turn.completion.text


def test_the_ledger_of_a_debate_is_what_the_engine_counted(form, store):
    engine = make_engine()
    settings = DebateConfig(agents=3, rounds=2, max_tokens=6)

    async def everyone():
        caller = Caller(engine, store, form, seed=0)
        return await asyncio.gather(*(debate(question, caller, settings) for question in (QUESTION, OTHER)))

    asyncio.run(everyone())
    total = store.ledger()[0]
    assert (total.calls, total.failed) == (12, 0)
    assert total.completion_tokens == engine.sampled_tokens
    # The last token of a prompt is read by the first decode step.
    assert total.prompt_tokens - total.cached_tokens - total.calls == engine.prefilled_tokens
    assert total.cached_tokens > 0
    parts = store.ledger("protocol", "round", "agent", "question_id")
    assert len(parts) == 12
    for name in ("calls", "prompt_tokens", "cached_tokens", "completion_tokens"):
        assert sum(getattr(part, name) for part in parts) == getattr(total, name)
    assert sum(part.seconds for part in parts) == pytest.approx(total.seconds)


@pytest.mark.parametrize(
    "wrong", [{"agents": 0}, {"rounds": 0}, {"temperature": 0.0}, {"temperature": -1.0}, {"max_tokens": 0}]
)
def test_debate_settings_are_checked(wrong):
    with pytest.raises(UsageError, match=f"debate.{next(iter(wrong))}"):
        DebateConfig(**wrong)
