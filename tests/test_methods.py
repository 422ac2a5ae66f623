"""The methods beside debate: who is asked what and how often, when they stop, and what a failed call changes."""

import asyncio
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from chat_families import write_family
from scripted import BabblingEngine, Killed, ScriptedEngine

from agentark_jax.data.chat import make_format
from agentark_jax.data.config import PromptConfig
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.local import LocalEngine
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models import transformer
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.source import ScratchConfig
from agentark_jax.protocols.agentverse import AgentverseConfig, agentverse
from agentark_jax.protocols.calls import Caller, Draw
from agentark_jax.protocols.config import DebateConfig
from agentark_jax.protocols.debate import debate
from agentark_jax.protocols.dylan import DylanConfig, dylan
from agentark_jax.protocols.macnet import MacnetConfig, edges, macnet
from agentark_jax.protocols.mad import MadConfig, mad
from agentark_jax.protocols.mav import ASPECTS, MavConfig, mav
from agentark_jax.protocols.self_consistency import SelfConsistencyConfig, self_consistency
from agentark_jax.protocols.single import SingleConfig, single
from agentark_jax.protocols.table import Agent, Pool
from agentark_jax.records import Question
from agentark_jax.traces.store import TraceStore

QUESTION = Question.make("task", "debate", "How many?", "7")

# The last words of each instruction, and what is said to it; to anything else the answer is the call's seed.
SAYS = {
    'or "Verdict: open".': "Both have a point. Verdict: open",
    "You are the judge": "The answer is 3.",
    'or "Approved: no".': "Approved: yes",
    "i and j their numbers.": "The best are answers 1 and 3",
    "say so.": "Nothing is wrong.",
    "in one numbered line.": "1. A mathematician\n2. A teacher",
    "what to change.": "Count again.",
    'or "Score: 0".': "Count again. Score: 0",
    "k its number.": "The best is answer 2",
}


def script(prompt, sampling, says=None):
    for words, said in {**SAYS, **(says or {})}.items():
        if words in prompt[-260:]:
            return said
    return f"The answer is {sampling.seed % 1000}."


# Method, config, calls of a whole run in which nobody agrees.
METHODS = {
    "direct": (single, SingleConfig(), 1),
    "cot": (single, SingleConfig(cot=True), 1),
    "vote": (self_consistency, SelfConsistencyConfig(samples=4), 4),
    "merge": (self_consistency, SelfConsistencyConfig(samples=4, aggregation="summariser"), 5),
    "debate": (debate, DebateConfig(agents=3, rounds=3, aggregation="summariser"), 10),
    "mad": (mad, MadConfig(rounds=2), 7),
    "dylan": (dylan, DylanConfig(agents=4, rounds=4), 2 * 4 + 1 + 2 * 2),
    "mav": (mav, MavConfig(candidates=3, aspects=2), 9),
    "chain": (macnet, MacnetConfig(agents=4, graph="chain"), 1 + 2 * 3),
    "star": (macnet, MacnetConfig(agents=4, graph="star"), 1 + 2 * 3 + 1),
    "tree": (macnet, MacnetConfig(agents=5, graph="tree"), 1 + 2 * 4 + 1),
    "net": (macnet, MacnetConfig(agents=4, graph="net"), 1 + 2 * 6 + 2),
    "mlp": (macnet, MacnetConfig(agents=5, graph="mlp"), 2 + 2 * 6 + 3),
    "agentverse": (agentverse, AgentverseConfig(agents=2, turns=2, critic_rounds=2), 2 * (1 + 2 * 2 + 1)),
}


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return cache(lambda name: make_format(write_family(name, root / name), PromptConfig()))


@pytest.fixture
def store(tmp_path):
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_questions([QUESTION])
        yield store


def run(form, store, method, config, says=None, agents=1, **engine):
    engine = ScriptedEngine(form, lambda prompt, sampling: script(prompt, sampling, says), **engine)
    pool = Pool((Agent(Caller(engine, store, form, seed=0)),) * agents)
    return asyncio.run(method(QUESTION, pool, config)), engine


def of(result, role):
    return [turn for turn in result.turns if turn.call.role == role]


def prompt_of(turn, form):
    return form.tokenizer.decode(turn.call.prompt_ids.tolist())


def keys(turns):
    return [turn.key for turn in turns]


# What holds for every method


def test_a_method_takes_the_stated_number_of_calls_and_answers(form, store, method):
    function, config, calls = method
    result, engine = run(form, store, function, config)
    assert len(engine.prompts) == len(result.turns) == calls
    assert result.answer
    assert not result.notes
    assert set(keys(result.final)) <= set(keys(result.turns))
    places = [(turn.call.round, turn.call.agent, turn.call.sample, turn.call.role) for turn in result.turns]
    assert places == sorted(set(places))
    again, engine = run(form, store, function, config)
    assert not engine.prompts
    assert keys(again.turns) == keys(result.turns)


@pytest.mark.parametrize("name", ["plain", "gemma3", "qwen3"])
def test_what_is_quoted_is_quoted_verbatim(form, family, store, method, name):
    form = form if name == "plain" else family(name)
    function, config, calls = method
    pool = Pool((Agent(Caller(BabblingEngine(form), store, form, seed=0)),))
    result = asyncio.run(function(QUESTION, pool, config))
    assert len(result.turns) == calls
    said = {turn.key: form.shown(turn.completion.ids.tolist()) for turn in result.turns}
    for turn in result.turns:
        assert all(said[key] in turn.call.prompt for key in turn.call.parents)
        assert len(turn.call.prompt) >= 1 + len(turn.call.parents)


def test_a_method_killed_at_any_call_repeats_nothing(form, tmp_path, method):
    function, config, calls = method

    def attempt(name, kill_at=None):
        with TraceStore(tmp_path / name / "traces.sqlite") as store:
            store.put_questions([QUESTION])
            known = sum(1 for _ in store.turns())
            result, engine = run(form, store, function, config, kill_at=kill_at)
            return result, known + len(engine.prompts)

    whole, _ = attempt("whole")
    for kill_at in range(calls):
        with pytest.raises(Killed):
            attempt(str(kill_at), kill_at)
        result, paid = attempt(str(kill_at))
        assert paid == calls
        assert keys(result.turns) == keys(whole.turns)
        assert (result.answer, keys(result.final), result.scores) == (whole.answer, keys(whole.final), whole.scores)


def test_any_one_call_may_fail(form, tmp_path, method):
    function, config, calls = method
    for failed in range(calls):
        with TraceStore(tmp_path / f"{failed}.sqlite") as store:
            store.put_questions([QUESTION])
            fails = lambda prompt, call, failed=failed: call == failed  # noqa: E731
            if calls == 1 or (function is agentverse and failed == 1):  # nobody else was asked for an answer
                with pytest.raises(AgentArkError, match="nobody could answer"):
                    run(form, store, function, config, fails=fails)
                continue
            result, _ = run(form, store, function, config, fails=fails)
            (note,) = [note for note in result.notes if note.kind == "failed"]
            assert store.attempts(note.key) == 1
            assert note.key not in keys(result.turns)
            assert result.final


def test_a_method_in_which_every_call_fails_is_an_error(form, store, method):
    function, config, _ = method
    with pytest.raises(AgentArkError, match=QUESTION.id):
        run(form, store, function, config, fails=lambda prompt, call: True)


# Each method's own


def test_step_by_step_is_asked_for(form, store):
    result, _ = run(form, store, single, SingleConfig(cot=True))
    assert "How many?\n\nThink step by step." in prompt_of(result.turns[0], form)
    result, _ = run(form, store, single, SingleConfig())
    assert prompt_of(result.turns[0], form) == "Question: How many?\nAnswer:"


def test_the_most_frequent_sample_wins(form, store):
    answers = iter(["1", "2", "2", "No idea"])
    engine = ScriptedEngine(form, lambda prompt, sampling: f"The answer is {next(answers)}.")
    pool = Pool((Agent(Caller(engine, store, form, seed=0)),))
    result = asyncio.run(self_consistency(QUESTION, pool, SelfConsistencyConfig(samples=4)))
    assert result.answer == "2"
    assert {turn.call.sampling.temperature for turn in result.turns} == {0.7}


def test_in_mad_each_hears_all_that_was_said(form, store):
    result, _ = run(form, store, mad, MadConfig(rounds=3))
    assert [turn.call.role for turn in result.turns] == ["affirmative", "negative", "moderator"] * 3 + ["judge"]
    speeches = keys(turn for turn in result.turns if turn.call.role in ("affirmative", "negative"))
    heard = [turn.call.parents for turn in result.turns]
    assert heard == [tuple(speeches[:count]) for count in (0, 1, 2, 2, 3, 4, 4, 5, 6, 6)]
    assert (result.stopped, result.answer) == ("judge", "3")


@pytest.mark.parametrize(("verdict", "side"), [("affirmative", "affirmative"), ("Negative", "negative")])
def test_a_verdict_ends_mad(form, store, verdict, side):
    says = {'or "Verdict: open".': f"I have heard enough. Verdict: {verdict}"}
    result, engine = run(form, store, mad, MadConfig(rounds=3), says=says)
    assert len(engine.prompts) == 3
    assert (result.stopped, [turn.call.role for turn in result.final]) == ("verdict", [side])


def test_a_verdict_that_cannot_be_read_leaves_mad_open(form, store):
    result, engine = run(form, store, mad, MadConfig(rounds=2), says={'or "Verdict: open".': "Hard to say."})
    assert len(engine.prompts) == 7
    assert [note.kind for note in result.notes] == ["unreadable"] * 2


def test_in_dylan_the_ranked_two_go_on(form, store):
    result, _ = run(form, store, dylan, DylanConfig(agents=4, rounds=4))
    layers = [[turn for turn in of(result, "solver") if turn.call.round == round] for round in range(4)]
    assert [[turn.call.agent for turn in layer] for layer in layers] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2], [0, 2]]
    for before, after in pairwise(layers):
        assert {turn.call.parents for turn in after} == {tuple(keys(before))}
    (ranker,) = of(result, "ranker")
    assert ranker.call.parents == tuple(keys(layers[1]))
    assert keys(result.final) == keys(layers[3])
    assert sum(result.scores.values()) == pytest.approx(4)  # 1 in every layer
    assert result.scores[0] == result.scores[2] > result.scores[1] == result.scores[3]


def test_in_dylan_ratings_make_importance(form, store):
    rates = "Rating of answer 1: 1\nRating of answer 2: 4\n"
    says = {"and nothing after it.": rates + "The answer is 5."}
    result, _ = run(form, store, dylan, DylanConfig(agents=2, rounds=2), says=says)
    assert result.scores == pytest.approx({0: 0.5 + 0.2, 1: 0.5 + 0.8})
    assert result.stopped == "consensus"


def test_dylan_stops_when_more_than_two_thirds_agree(form, store):
    for agreeing, rounds in ((2, 2), (3, 1)):
        answers = iter(["1"] * agreeing + [str(number) for number in range(2, 9)])
        engine = ScriptedEngine(form, lambda prompt, sampling, answers=answers: f"The answer is {next(answers)}.")
        pool = Pool((Agent(Caller(engine, store, form, seed=agreeing)),))
        result = asyncio.run(dylan(QUESTION, pool, DylanConfig(agents=3, rounds=2)))
        assert result.turns[-1].call.round + 1 == rounds
        assert result.stopped == ("consensus" if rounds == 1 else "rounds")


def test_without_a_ranker_the_ratings_choose(form, store):
    rates = "".join(f"Rating of answer {number}: {rating}\n" for number, rating in enumerate((1, 5, 2, 4), 1))
    numbers = iter(range(100))
    engine = ScriptedEngine(
        form,
        lambda prompt, sampling: (
            "Who knows" if "i and j their numbers" in prompt else f"{rates}The answer is {next(numbers)}."
        ),
    )
    pool = Pool((Agent(Caller(engine, store, form, seed=0)),))
    result = asyncio.run(dylan(QUESTION, pool, DylanConfig(agents=4, rounds=3)))
    assert [turn.call.agent for turn in result.turns if turn.call.round == 2] == [1, 3]
    assert [note.kind for note in result.notes] == ["unreadable"]


def test_in_mav_most_approvals_win(form, store):
    def says(prompt, sampling):
        if "Approved" not in prompt:
            return f"The answer is {sampling.seed % 1000}."
        return f"Approved: {'yes' if said in prompt or ASPECTS[0] in prompt else 'no'}"

    engine = ScriptedEngine(form, says)
    pool = Pool((Agent(Caller(engine, store, form, seed=0)),))
    said = "unknown yet"
    first = asyncio.run(mav(QUESTION, pool, MavConfig(candidates=3, aspects=1)))
    assert first.final == first.turns[:1]  # a tie
    said = of(first, "solver")[1].completion.text
    result = asyncio.run(mav(QUESTION, pool, MavConfig(candidates=3, aspects=3)))
    assert result.scores == {0: 1, 1: 3, 2: 1}
    assert result.final == tuple(of(result, "solver")[1:2])
    for turn in of(result, "verifier"):
        assert turn.call.parents == (of(result, "solver")[turn.call.sample].key,)
        assert ASPECTS[turn.call.agent - 1] in prompt_of(turn, form)
        assert turn.call.sampling.temperature == 0


def test_the_graphs_of_macnet():
    assert edges("chain", 4, 0) == [(0, 1), (1, 2), (2, 3)]
    assert edges("star", 4, 0) == [(0, 1), (0, 2), (0, 3)]
    assert edges("tree", 6, 0) == [(0, 1), (0, 2), (1, 3), (1, 4), (2, 5)]
    assert edges("net", 3, 0) == [(0, 1), (0, 2), (1, 2)]
    assert edges("mlp", 5, 0) == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 4), (3, 4)]
    drawn = {tuple(edges("random", 7, seed)) for seed in range(5)}
    assert len(drawn) == 5
    for links in drawn:
        assert {j for _, j in links} == set(range(1, 7))
        assert all(i < j for i, j in links)
    assert edges("random", 7, 3) == edges("random", 7, 3)


def test_macnet_refines_along_edges_and_cools_with_depth(form, store):
    result, _ = run(form, store, macnet, MacnetConfig(agents=3, graph="net"))
    names = {turn.key: (turn.call.role, turn.call.agent, turn.call.sample) for turn in result.turns}
    seen = {names[turn.key]: [names[key] for key in turn.call.parents] for turn in result.turns}
    source, merged = ("actor", 0, 0), ("merger", 2, 0)
    assert seen == {
        source: [],
        ("critic", 1, 0): [source],
        ("actor", 1, 0): [source, ("critic", 1, 0)],
        ("critic", 2, 0): [source],
        ("actor", 2, 0): [source, ("critic", 2, 0)],
        ("critic", 2, 1): [("actor", 1, 0)],
        ("actor", 2, 1): [("actor", 1, 0), ("critic", 2, 1)],
        merged: [("actor", 2, 0), ("actor", 2, 1)],
    }
    assert [names[key] for key in keys(result.final)] == [merged]
    warm = {turn.call.round: turn.call.sampling.temperature for turn in result.turns}
    assert warm == pytest.approx({0: 0.7, 1: 0.7 * 2 / 3, 2: 0.7 / 3})


def test_random_graphs_of_macnet_take_the_stated_number_of_calls(form, store):
    for seed in range(3):
        links = edges("random", 6, seed)
        into = [sum(j == node for _, j in links) for node in range(6)]
        sinks = sum(all(node != i for i, _ in links) for node in range(6))
        result, _ = run(form, store, macnet, MacnetConfig(agents=6, graph="random", seed=seed))
        assert len(result.turns) == 1 + 2 * len(links) + sum(count > 1 for count in into) + (sinks > 1)


def test_agentverse_recruits_criticises_and_evaluates(form, store):
    result, _ = run(form, store, agentverse, AgentverseConfig(agents=3, turns=2, critic_rounds=2))
    roles = [(turn.call.round, turn.call.role) for turn in result.turns]
    assert roles[:4] == [(0, "recruiter"), (0, "solver"), (0, "critic"), (0, "critic")]
    assert roles[4:8] == [(1, "solver"), (1, "critic"), (1, "critic"), (1, "evaluator")]
    first, second, third, _ = of(result, "solver")
    recruiters, evaluators, critics = of(result, "recruiter"), of(result, "evaluator"), of(result, "critic")
    assert first.call.parents == (recruiters[0].key,)
    assert second.call.parents == (recruiters[0].key, first.key, *keys(critics[:2]))
    assert evaluators[0].call.parents == (recruiters[0].key, second.key)
    assert recruiters[1].call.parents == (evaluators[0].key,)
    assert third.call.parents == (recruiters[1].key, evaluators[0].key, second.key)
    assert result.stopped == "turns"


def test_agentverse_ends_when_all_agree_and_the_evaluator_accepts(form, store):
    says = {"what to change.": "[Agree]", 'or "Score: 0".': "Fine. Score: 1"}
    result, _ = run(form, store, agentverse, AgentverseConfig(agents=3), says=says)
    assert [turn.call.role for turn in result.turns] == ["recruiter", "solver", "critic", "critic", "evaluator"]
    assert (result.stopped, result.final) == ("accepted", (result.turns[1],))


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (SelfConsistencyConfig, {"samples": 0}),
        (MadConfig, {"rounds": 0}),
        (DylanConfig, {"agents": 0}),
        (MavConfig, {"aspects": 9}),
        (MacnetConfig, {"graph": "cube"}),
        (AgentverseConfig, {"critic_rounds": 0}),
    ],
)
def test_settings_are_checked(config, wrong):
    with pytest.raises(UsageError, match=f"{config.__name__}.{next(iter(wrong))}"):
        config(**wrong)


# The embedded engine


@pytest.fixture(scope="module")
def engine(form):
    tokenizer = form.tokenizer
    shape = ScratchConfig(hidden_size=32, layers=1, head_dim=16, intermediate_size=32, max_positions=1024)
    raw = shape.to_hf(vocabulary=tokenizer.vocabulary_size, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    config = ModelConfig.from_hf(raw, "test")
    params = transformer.init_params(config, 0)
    settings = EngineConfig(slots=8, chunk=8, prompt_bucket=512)
    return LocalEngine(settings, config, params, tokenizer, context=1024, model="random", weights="0")


@pytest.mark.parametrize("name", [*sorted(METHODS), "random"])
def test_a_method_runs_on_the_embedded_engine(form, store, engine, name):
    """A random model agrees to nothing and writes no verdict, so that every method takes its longest way."""
    function, config, calls = METHODS.get(name, (macnet, MacnetConfig(agents=5, graph="random"), None))
    short = Draw(1.0, 12)
    settings = {"max_tokens": 12} if function is debate else {"draw": short}
    config = type(config)(**{**vars(config), **settings})
    pool = Pool((Agent(Caller(engine, store, form, seed=0), context=1024),))
    result = asyncio.run(function(QUESTION, pool, config))
    assert calls in (None, len(result.turns))
    assert {note.kind for note in result.notes} <= {"unreadable"}
    for turn in result.turns:
        assert turn.call.weights == "0"
        assert np.isfinite(turn.completion.logprobs).all()
