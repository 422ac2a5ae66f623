"""Control flow of single answers and debates against a scripted engine; every call kept and never paid for twice."""

import asyncio
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
from chat_families import FAMILIES, write_family
from hypothesis import given
from hypothesis import strategies as st
from scripted import BabblingEngine, Killed, ScriptedEngine
from test_engine import make_engine

from agentark_jax.data.chat import make_format
from agentark_jax.data.config import PromptConfig
from agentark_jax.data.loader import packed_batches
from agentark_jax.data.render import turn_example
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.protocols.calls import Caller, Draw
from agentark_jax.protocols.config import DebateConfig
from agentark_jax.protocols.debate import debate, longest_prompt
from agentark_jax.protocols.peers import another_question, derangement, neighbours, noise, real
from agentark_jax.protocols.self_consistency import SelfConsistencyConfig, self_consistency
from agentark_jax.protocols.single import answer, explain
from agentark_jax.protocols.table import Agent, Pool
from agentark_jax.records import Question
from agentark_jax.traces.store import TraceStore

QUESTION = Question.make("task", "debate", "How many?", "7")
OTHER = Question.make("task", "debate", "How few?", "1")


@pytest.fixture
def store(tmp_path):
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_questions([QUESTION, OTHER])
        yield store


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    directory = cache(lambda name: write_family(name, root / name))
    return cache(lambda name, system="": make_format(directory(name), PromptConfig(system=system)))


def numbered(prompt, sampling):
    """A different answer for every call: its seed."""
    return f"The answer is {sampling.seed % 1000}."


def pool_of(engine, store, *, context=None):
    return Pool((Agent(Caller(engine, store, engine.form, seed=0), context=context),))


def run(engine, store, *, question=QUESTION, peers=real, context=None, **settings):
    config = DebateConfig(**settings)
    return asyncio.run(debate(question, pool_of(engine, store, context=context), config, peers))


def by_round(result, role="debater"):
    rounds = {}
    for turn in result.turns:
        if turn.call.role == role:
            rounds.setdefault(turn.call.round, []).append(turn)
    return [rounds[round] for round in sorted(rounds)]


def keys(turns):
    return [turn.key for turn in turns]


def prompt_of(turn, form):
    return form.tokenizer.decode(turn.call.prompt_ids.tolist())


def flat(prompt):
    return [token for segment in prompt for token in segment]


# Who sees what


def test_a_round_sees_ones_own_answers_so_far_and_the_peers_last(form, store):
    rounds = by_round(run(ScriptedEngine(form, numbered), store, agents=3, rounds=3))
    assert [[turn.call.agent for turn in turns] for turns in rounds] == [[0, 1, 2]] * 3
    for round in (1, 2):
        texts = [[turn.completion.text for turn in turns] for turns in rounds[:round]]
        for agent, turn in enumerate(rounds[round]):
            own = [said[agent] for said in texts]
            peers = [text for index, text in enumerate(texts[-1]) if index != agent]
            expected = "Question: How many?\n" + "".join(f"My answer:\n{text}\n" for text in own)
            expected += "".join(f"Another answer:\n{text}\n" for text in peers) + "Better answer:"
            assert prompt_of(turn, form) == expected
            assert turn.call.parents == (
                *(turns[agent].key for turns in rounds[:round]),
                *(turn.key for index, turn in enumerate(rounds[round - 1]) if index != agent),
            )
    assert len({turn.call.sampling.seed for turns in rounds for turn in turns}) == 9


def test_history_may_be_the_last_answer_alone(form, store):
    rounds = by_round(run(ScriptedEngine(form, numbered), store, rounds=3, history="last"))
    assert [prompt_of(turn, form).count("My answer") for turn in rounds[2]] == [1, 1, 1]


def test_one_agent_alone_revises_its_own_answer(form, store):
    rounds = by_round(run(ScriptedEngine(form, numbered), store, agents=1, rounds=2))
    assert "Another answer" not in prompt_of(rounds[1][0], form)


@pytest.mark.parametrize(
    ("topology", "seen"),
    [
        ("full", [[1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3]]),
        ("ring", [[1, 4], [0, 2], [1, 3], [2, 4], [0, 3]]),
        ("star", [[1, 2, 3, 4], [0], [0], [0], [0]]),
        ("sparse-2", [[1, 2], [2, 3], [3, 4], [0, 4], [0, 1]]),
        ("none", [[], [], [], [], []]),
    ],
)
def test_a_topology_says_whom_an_agent_hears(form, store, topology, seen):
    assert [neighbours(topology, 5, agent) for agent in range(5)] == seen
    first, second = by_round(run(ScriptedEngine(form, numbered), store, agents=5, rounds=2, topology=topology))
    for turn, peers in zip(second, seen, strict=True):
        assert turn.call.parents == tuple(first[agent].key for agent in (turn.call.agent, *peers))
        assert prompt_of(turn, form).count("Another answer:") == len(peers)


def test_small_rings_and_stars():
    assert [neighbours("ring", 2, agent) for agent in range(2)] == [[1], [0]]
    assert [neighbours(topology, 1, 0) for topology in ("full", "ring", "star", "none")] == [[]] * 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"named": True}, "My answer:\n{1}\nAgent 1's answer:\n{0}\nAgent 3's answer:\n{2}\nI am agent 2."),
        ({"layout": "shared_first"}, "Answer 1:\n{0}\nAnswer 2:\n{1}\nAnswer 3:\n{2}\nAnswer 2 is mine."),
        (
            {"layout": "shared_first", "named": True, "topology": "sparse-1"},
            "Agent 2's answer:\n{1}\nAgent 3's answer:\n{2}\nI am agent 2.",
        ),
    ],
)
def test_how_the_second_agent_sees_what_was_said(form, store, options, expected):
    first, second = by_round(run(ScriptedEngine(form, numbered), store, **options))
    said = expected.format(*(turn.completion.text for turn in first))
    assert prompt_of(second[1], form) == f"Question: How many?\n{said}\nBetter answer:"


def shared(prompts):
    return next(
        (place for place, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1),
        min(map(len, prompts)),
    )


@pytest.mark.parametrize("name", ["plain", *sorted(FAMILIES)])
def test_shared_first_prompts_of_a_round_share_all_answers(form, family, store, name):
    form = form if name == "plain" else family(name)
    engine = BabblingEngine(form)
    rounds = by_round(run(engine, store, agents=4, rounds=3, layout="shared_first"))
    said = [[form.shown(turn.completion.ids.tolist()) for turn in turns] for turns in rounds]
    for round in rounds[1:]:
        # Question and four answers: eight segments at the front are the same for all.
        front = sum(map(len, round[0].call.prompt[:8]))
        assert shared([turn.call.prompt_ids.tolist() for turn in round]) >= front
        assert {turn.call.prompt[:8] for turn in round} == {round[0].call.prompt[:8]}
    # That is what the engine is told: nothing at first, then all up to the end of the last answer.
    assert [request.shared for request in engine.requests[:4]] == [0] * 4
    for before, asked in ((said[0], engine.requests[4:8]), (said[1], engine.requests[8:])):
        (told,) = {tuple(request.prompt_ids[: request.shared].tolist()) for request in asked}
        assert told[-len(before[3]) :] == before[3]
        assert len(told) <= shared([request.prompt_ids.tolist() for request in asked])
    engine = BabblingEngine(form)
    own_first = by_round(run(engine, store, agents=4, rounds=2))[1]
    assert {request.shared for request in engine.requests} == {0}
    # The title of the own answer is still the same, and a first token may be, by chance.
    assert shared([turn.call.prompt_ids.tolist() for turn in own_first]) <= sum(map(len, own_first[0].call.prompt[:2]))


@pytest.mark.parametrize("options", [{}, {"named": True}, {"layout": "shared_first"}, {"aggregation": "summariser"}])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_sampled_ids_enter_every_later_prompt_verbatim(family, store, name, options):
    form = family(name)
    result = run(BabblingEngine(form), store, agents=3, rounds=3, **options)
    said = {turn.key: turn for turn in result.turns}
    assert len(result.turns) == 9 + ("aggregation" in options)
    for turn in result.turns:
        quoted = [form.shown(said[key].completion.ids.tolist()) for key in turn.call.parents]
        assert sorted(turn.call.prompt[1::2]) == sorted(quoted)
        assert len(turn.call.prompt) == 2 * len(quoted) + 1
        if turn.call.role == "debater" and turn.call.round == 2 and options.get("layout") != "shared_first":
            assert turn.call.prompt[1::2] == tuple(quoted)  # own answers oldest first, then the peers'
    # An answer that several prompts quote stands in memory once.
    of_round = [segment for turn in result.turns if turn.call.round == 1 for segment in turn.call.prompt[1::2]]
    assert len(set(map(id, of_round))) == len(set(of_round)) == 3


class WitnessedEngine(BabblingEngine):
    """Keeps what it answered."""

    def __init__(self, form):
        super().__init__(form)
        self.answered = Counter()

    async def generate(self, request):
        completion = await super().generate(request)
        self.answered[tuple(completion.ids.tolist())] += 1
        return completion


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_was_received_is_what_a_batch_trains_on(family, tmp_path, name):
    """270 turns of three rounds, through the store and into packed batches: each completion's ids, and no other, have
    loss, in their order."""
    form = family(name)
    engine = WitnessedEngine(form)
    questions = [Question.make("task", "debate", f"How many, {number}?", "7") for number in range(30)]
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_questions(questions)
        for question in questions:
            run(engine, store, question=question, agents=3, rounds=3)
        by_id = {question.id: question for question in questions}
        examples = [turn_example(form, by_id[turn.call.question_id], turn, variant="v") for turn in store.turns()]
    batches = packed_batches(examples, seed=0, epochs=1, rows=4, row_length=512)
    trained = Counter()
    for step in range(len(batches)):
        batch = batches.batch(step)
        for ids, segments, weights in zip(
            batch["ids"], batch["segment_ids"], batch["weights"]["completion"], strict=True
        ):
            for segment in range(1, segments.max() + 1):
                trained[tuple(ids[(segments == segment) & (weights > 0)].tolist())] += 1
    assert engine.answered.total() == 270
    assert trained == engine.answered


def test_a_chat_of_three_rounds_is_one_conversation(family, store):
    form = family("llama3")
    rounds = by_round(run(ScriptedEngine(form, numbered), store, agents=2, rounds=3))
    prompt = prompt_of(rounds[2][0], form)
    assert prompt.count("Other agents have answered") == 1
    assert prompt.count("Check your answer step by step") == 1
    texts = [turns[0].completion.text for turns in rounds[:2]] + [rounds[1][1].completion.text]
    assert [prompt.find(text) for text in texts] == sorted(prompt.find(text) for text in texts)
    # A conversation only grows: the first round's prompt begins the third's.
    first = rounds[0][0].call.prompt_ids.tolist()
    assert rounds[2][0].call.prompt_ids.tolist()[: len(first)] == first


def test_the_longest_prompt_is_what_a_debate_can_take(form, family, store):
    for each in (form, family("gemma3")):
        for options in ({}, {"layout": "shared_first", "named": True}, {"aggregation": "judge"}, {"rounds": 1}):
            settings = DebateConfig(**{"rounds": 3, "max_tokens": 13, **options})
            result = asyncio.run(debate(QUESTION, pool_of(BabblingEngine(each), store), settings))
            longest = max(len(turn.call.prompt_ids) for turn in result.turns)
            assert longest <= longest_prompt(QUESTION, each, settings) <= longest + 13 * 5


# Placebos


@given(st.sets(st.text(), min_size=2), st.integers(0, 3))
def test_a_derangement_maps_nothing_to_itself(ids, seed):
    mapped = derangement(ids, seed)
    assert set(mapped) == set(mapped.values()) == ids
    assert all(key != value for key, value in mapped.items())
    assert derangement(sorted(ids), seed) == mapped


def test_a_derangement_is_seeded_and_needs_two():
    ids = [str(number) for number in range(9)]
    assert len({tuple(derangement(ids, seed).items()) for seed in range(5)}) == 5
    with pytest.raises(UsageError, match=r"debate\.peers is 'other'"):
        derangement(["one"], 0)


def test_peers_of_another_question_say_what_they_first_said_there(form, store):
    engine = ScriptedEngine(form, numbered)
    firsts = [turn for question in (QUESTION, OTHER) for turn in run(engine, store, question=question, rounds=1).turns]
    there = {turn.call.agent: turn for turn in firsts if turn.call.question_id == OTHER.id}
    rounds = by_round(run(engine, store, rounds=3, peers=another_question(firsts, 0)))
    assert len(engine.prompts) == 6 + 6  # the first round was at hand
    for turns in rounds[1:]:
        for turn in turns:
            peers = [peer for peer in range(3) if peer != turn.call.agent]
            assert turn.call.parents[-2:] == tuple(there[peer].key for peer in peers)
            assert prompt_of(turn, form).count("How many?") == 1


def test_noise_is_as_long_as_what_it_stands_for_and_nothing_of_it(form, store):
    def prompts(seed):
        result = run(BabblingEngine(form), store, rounds=2, peers=noise(seed))
        return by_round(result)

    first, second = prompts(0)
    for turn in second:
        own, *others = turn.call.prompt[2::2]
        assert turn.call.parents == (first[turn.call.agent].key,)
        assert own == form.shown(first[turn.call.agent].completion.ids.tolist())
        peers = [form.shown(peer.completion.ids.tolist()) for peer in first if peer.call.agent != turn.call.agent]
        assert [len(ids) for ids in others] == [len(ids) for ids in peers]
        assert not set(others) & set(peers)
    assert [keys(turns) for turns in prompts(0)] == [keys(first), keys(second)]
    assert keys(prompts(1)[1]) != keys(second)
    # All who hear a peer hear the same of it.
    assert second[0].call.prompt[6] == second[1].call.prompt[6]


# Calls, failures, resumption


def test_a_repeated_run_asks_nothing_and_a_longer_one_only_the_new_round(form, store):
    engine = ScriptedEngine(form, numbered)
    first = run(engine, store, rounds=2)
    assert len(engine.prompts) == 6
    again = run(engine, store, rounds=2)
    assert len(engine.prompts) == 6
    assert keys(again.turns) == keys(first.turns)
    longer = run(engine, store, rounds=3)
    assert len(engine.prompts) == 9
    assert keys(longer.turns)[:6] == keys(first.turns)


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({"agents": 5, "rounds": 3}, 15),
        ({"agents": 20, "rounds": 2}, 40),
        ({"agents": 5, "rounds": 3, "aggregation": "summariser"}, 16),
        ({"agents": 2, "rounds": 1, "aggregation": "judge"}, 3),
        ({"agents": 1, "rounds": 4, "topology": "none", "aggregation": "weighted"}, 4),
    ],
)
def test_a_debate_takes_agents_times_rounds_calls(form, store, settings, calls):
    engine = ScriptedEngine(form, numbered)
    result = run(engine, store, **settings)
    assert len(engine.prompts) == len(result.turns) == calls
    assert result.stopped == "rounds"
    assert [turn.call.round for turn in result.turns] == sorted(turn.call.round for turn in result.turns)


@pytest.mark.parametrize("aggregation", ["majority", "summariser"])
def test_a_debate_killed_at_any_call_repeats_nothing(form, tmp_path, aggregation):
    def attempt(folder, kill_at=None):
        engine = ScriptedEngine(form, numbered, kill_at=kill_at)
        with TraceStore(tmp_path / folder / "traces.sqlite") as store:
            store.put_questions([QUESTION])
            known = sum(1 for _ in store.turns())
            try:
                return run(engine, store, agents=2, rounds=3, aggregation=aggregation), known, len(engine.prompts)
            except Killed:
                return None

    whole, _, calls = attempt("whole")
    assert calls == 6 + (aggregation == "summariser")
    for kill_at in range(calls):
        assert attempt(str(kill_at), kill_at) is None
        result, known, asked = attempt(str(kill_at))
        assert known + asked == calls
        assert keys(result.turns) == keys(whole.turns)
        assert result.answer == whole.answer


def test_an_agent_whose_call_fails_keeps_its_last_answer(form, store):
    # Calls 0-2 are the first round's; call 4 is the second agent's in the second.
    engine = ScriptedEngine(form, numbered, fails=lambda prompt, call: call == 4)
    result = run(engine, store, rounds=3)
    first, second, third = by_round(result)
    assert [turn.call.agent for turn in second] == [0, 2]
    assert first[1].key in third[0].call.parents
    assert third[1].call.parents == (first[1].key, second[0].key, second[1].key)
    (note,) = result.notes
    assert (note.kind, note.detail) == ("failed", "the server went away")
    assert store.attempts(note.key) == 1
    assert len(result.final) == 3


def test_an_agent_that_never_answered_is_asked_alone_and_not_heard(form, store):
    result = run(ScriptedEngine(form, numbered, fails=lambda prompt, call: call == 1), store, rounds=2)
    first, second = by_round(result)
    assert [turn.call.agent for turn in first] == [0, 2]
    assert prompt_of(second[1], form) == "Question: How many?\nAnswer:"
    assert prompt_of(second[0], form).count("Another answer:") == 1
    assert len(result.final) == 3


def test_an_agent_that_fails_at_the_end_votes_with_what_it_last_said(form, store):
    result = run(ScriptedEngine(form, numbered, fails=lambda prompt, call: call == 5), store, rounds=2)
    assert [turn.call.round for turn in result.final] == [1, 1, 0]
    assert len(result.turns) == 5


def test_a_debate_in_which_nobody_can_answer_is_an_error(form, store):
    engine = ScriptedEngine(form, numbered, fails=lambda prompt, call: True)
    with pytest.raises(AgentArkError, match=f"question {QUESTION.id}: nobody could answer .the server went away"):
        run(engine, store, rounds=3)
    assert len(engine.prompts) == 3
    assert [turn.attempt for turn in store.turns()] == [0, 0, 0]


def test_what_does_not_fit_is_left_out_in_a_stated_order(form, store):
    engine = ScriptedEngine(form, numbered)
    result = run(engine, store, rounds=3, max_tokens=8)
    whole = by_round(result)[2][0]
    lengths = {}
    for room in range(len(whole.call.prompt_ids) + 8, 0, -1):
        found = run(engine, store, rounds=3, max_tokens=8, context=room)
        turn = by_round(found)[2][0]
        owns, others = prompt_of(turn, form).count("My answer"), prompt_of(turn, form).count("Another answer")
        assert len(turn.call.parents) == owns + others
        assert len(turn.call.prompt_ids) + 8 <= room or (owns, others) == (1, 0)
        lengths.setdefault((owns, others), room)
        noted = [note.detail.split()[0] for note in found.notes if note.key == turn.key]
        assert noted == ([] if owns + others == 4 else [str(4 - owns - others)])
    assert list(lengths) == [(2, 2), (1, 2), (1, 1), (1, 0)]


def test_an_instruction_that_does_not_fit_leaves_out_what_was_said_first(form, store):
    engine = ScriptedEngine(form, numbered)
    settings = {"rounds": 1, "max_tokens": 8, "aggregation": "summariser"}
    *first, whole = run(engine, store, **settings).turns
    for left_out, room in ((0, len(whole.call.prompt_ids) + 8), (1, len(whole.call.prompt_ids) + 7)):
        result = run(engine, store, context=room, **settings)
        assert result.turns[-1].call.parents == tuple(keys(first)[left_out:])
        assert [note.kind for note in result.notes] == ["left_out"] * left_out
    assert "Answer 1:\n[...]\n\nAnswer 2:" in prompt_of(result.turns[-1], form)


# How a debate ends


def said(*answers):
    """The first agents' answers in a round: by the number of the call."""

    calls = iter(answers)
    return lambda prompt, sampling: (
        given if isinstance(given := next(calls), tuple) else given if " " in given else f"The answer is {given}."
    )


@pytest.mark.parametrize(
    ("early_stop", "answers", "rounds", "stopped"),
    [
        ("consensus", ["1", "1"], 1, "consensus"),
        ("consensus", ["1", "2", "2", "2.0"], 2, "consensus"),
        ("consensus", ["No idea", "No idea"] * 3, 3, "rounds"),
        ("consensus", ["1", "2", "2", "1", "1", "2"], 3, "rounds"),
        ("stable", ["1", "2", "1", "2"], 2, "stable"),
        ("stable", ["1", "1", "2", "2", "2", "2"], 3, "stable"),
        ("stable", ["1", "No idea"] * 3, 3, "rounds"),
        ("never", ["1", "1"] * 3, 3, "rounds"),
    ],
)
def test_a_debate_stops_when_it_should(form, store, early_stop, answers, rounds, stopped):
    result = run(ScriptedEngine(form, said(*answers)), store, agents=2, rounds=3, early_stop=early_stop)
    assert (len(by_round(result)), result.stopped) == (rounds, stopped)


SURE, UNSURE = -0.1, -3.0


@pytest.mark.parametrize(
    ("aggregation", "answers", "wanted", "final"),
    [
        ("majority", ["1", "2", "2"], "2", [0, 1, 2]),
        ("majority", ["3", "1", "2"], "3", [0, 1, 2]),
        ("majority", ["No idea", "1", "2"], "1", [0, 1, 2]),
        ("majority", ["No idea"] * 3, "", [0, 1, 2]),
        (
            "weighted",
            [("The answer is 1.", SURE), ("The answer is 2.", UNSURE), ("The answer is 2.", UNSURE)],
            "1",
            [0],
        ),
        ("weighted", ["1", "2", "2"], "2", [1, 2]),
        ("weighted", ["No idea"] * 3, "", [0, 1, 2]),
        ("judge", ["1", "2", "2", "All wrong. The best is answer 1."], "1", [0]),
        ("judge", ["1", "2", "2", "The best is answer 4."], "2", [0, 1, 2]),
        ("judge", ["1", "2", "2", "I like them all."], "2", [0, 1, 2]),
        ("summariser", ["1", "2", "2", "All wrong. The answer is 9."], "9", [3]),
        ("summariser", ["1", "2", "2", "I cannot say."], "", [3]),
    ],
)
def test_one_answer_is_made_of_the_last_ones(form, store, aggregation, answers, wanted, final):
    result = run(ScriptedEngine(form, said(*answers)), store, rounds=1, aggregation=aggregation)
    assert result.answer == wanted
    assert [turn.call.agent for turn in result.final] == final
    unreadable = aggregation == "judge" and final == [0, 1, 2]
    assert [note.kind for note in result.notes] == ["unreadable"] * unreadable
    for turn in result.turns[3:]:
        assert turn.call.parents == tuple(each.key for each in result.turns[:3])
        assert turn.call.sampling.temperature == 0


def test_an_answer_that_was_cut_off_has_no_vote(form, store):
    engine = ScriptedEngine(form, said("1", "2", "2"))
    answered = engine.generate

    async def cut_off(request):
        completion = await answered(request)
        return replace(completion, finish="length") if completion.text == "The answer is 2." else completion

    engine.generate = cut_off
    assert run(engine, store, rounds=1).answer == "1"


def test_a_judge_whose_call_fails_leaves_it_to_the_majority(form, store):
    engine = ScriptedEngine(form, numbered, fails=lambda prompt, call: call == 3)
    result = run(engine, store, rounds=1, aggregation="judge")
    assert len(result.final) == 3
    assert [note.kind for note in result.notes] == ["failed"]


def test_weights_need_logprobs(form, store):
    engine = ScriptedEngine(form, said(*[("The answer is 1.", float("nan"))] * 3))
    with pytest.raises(UsageError, match=r"debate\.aggregation is weighted.* scripted gives none: choose majority"):
        run(engine, store, rounds=1, aggregation="weighted")


def test_a_text_only_agent_cannot_vote_by_weight_and_nothing_is_paid_for(form, store):
    engines = [ScriptedEngine(form, numbered, model=f"model {index}") for index in range(3)]
    engines[1].text_only = True
    pool = Pool(tuple(Agent(Caller(engine, store, form, seed=0)) for engine in engines))
    complaint = r"debate\.aggregation is weighted.* model 1 gives none: choose majority"
    with pytest.raises(UsageError, match=complaint):
        asyncio.run(debate(QUESTION, pool, DebateConfig(agents=2, aggregation="weighted")))
    with pytest.raises(UsageError, match=complaint):
        asyncio.run(self_consistency(QUESTION, pool, SelfConsistencyConfig(samples=3, aggregation="weighted")))
    assert not any(engine.prompts for engine in engines)
    asyncio.run(debate(QUESTION, pool, DebateConfig(agents=1, aggregation="weighted")))
    asyncio.run(debate(QUESTION, pool, DebateConfig(agents=2)))
    assert engines[1].prompts


# Unlike agents


def test_agents_may_differ_in_model_temperature_and_prompt(family, store):
    forms = [family("llama3"), family("llama3", "You are a sceptic.")]
    engines = [ScriptedEngine(form, numbered, model=f"model {index}") for index, form in enumerate(forms)]
    agents = [
        Agent(Caller(engine, store, engine.form, seed=0), temperature=temperature)
        for engine, temperature in zip(engines, (0.3, None), strict=True)
    ]
    result = asyncio.run(debate(QUESTION, Pool(tuple(agents)), DebateConfig(agents=3)))
    assert [turn.call.model for turn in result.turns] == ["model 0", "model 1", "model 0"] * 2
    assert [turn.call.sampling.temperature for turn in result.turns] == [0.3, 0.8, 0.3] * 2
    assert ["sceptic" in prompt_of(turn, forms[0]) for turn in result.turns] == [False, True, False] * 2
    assert not result.notes


def test_what_was_said_with_another_tokenizer_is_read_as_text_and_marked(form, family, store):
    agents = [
        Agent(Caller(ScriptedEngine(each, numbered), store, each, seed=0)) for each in (form, family("llama3"), form)
    ]
    result = asyncio.run(debate(QUESTION, Pool(tuple(agents)), DebateConfig(agents=3)))
    first, second = by_round(result)
    assert [note.kind for note in result.notes] == ["retokenised"] * 3
    assert first[1].key in result.notes[0].detail
    own, verbatim = form.shown(first[0].completion.ids.tolist()), form.shown(first[2].completion.ids.tolist())
    assert second[0].call.prompt[2] == own
    assert second[0].call.prompt[4] == form.shown(form.response(first[1].completion.text))
    assert second[0].call.prompt[6] == verbatim
    for turn in second:
        prompt = prompt_of(turn, agents[turn.call.agent].caller.form)
        assert all(each.completion.text in prompt for each in first)


# One agent alone


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
    asyncio.run(answer(QUESTION, Pool((Agent(Caller(engine, store, form, seed=0)),)), Draw(**draw), protocol="single"))
    for key in ("weights", "model"):
        setattr(engine, key, change.get(key, getattr(engine, key)))
    draw.update({key: change[key] for key in draw if key in change})
    caller = Caller(engine, store, form, seed=change.get("seed", 0))
    asyncio.run(answer(QUESTION, Pool((Agent(caller),)), Draw(**draw), protocol="single"))
    assert len(engine.prompts) == 2


def test_who_explains_knows_the_answer_and_the_student_does_not(form, store):
    engine = ScriptedEngine(form, numbered)
    pool = Pool((Agent(Caller(engine, store, form, seed=0)),))
    turns = asyncio.run(explain(QUESTION, pool, Draw(0.8, 8), samples=2, protocol="hinted"))
    assert [(turn.call.protocol, turn.call.sample, turn.call.parents) for turn in turns] == [
        ("hinted", 0, ()),
        ("hinted", 1, ()),
    ]
    for prompt in engine.prompts:
        assert "How many?" in prompt
        assert "The right answer is 7." in prompt
        assert 'End with "The answer is ..."' in prompt
    learned = turn_example(form, QUESTION, turns[0], variant="round1_only").ids.tolist()
    asked = [token for segment in form.question(QUESTION) for token in segment]
    assert learned == [*asked, *turns[0].completion.ids.tolist()]


def test_samples_and_questions_have_seeds_of_their_own(form, store):
    caller = Caller(ScriptedEngine(form, numbered), store, form, seed=0)
    draw = Draw(0.8, 8)
    turns = asyncio.run(answer(QUESTION, Pool((Agent(caller),)), draw, samples=4, protocol="single"))
    turns += asyncio.run(answer(OTHER, Pool((Agent(caller),)), draw, samples=4, protocol="single"))
    assert len({turn.call.sampling.seed for turn in turns}) == 8
    assert all(0 <= turn.call.sampling.seed < 2**64 for turn in turns)


def test_who_is_told_the_answer_is_asked_for_the_way_to_it(form, store):
    """Agents in turn, each with its own temperature; the question alone is what `answer` asks."""
    engine = ScriptedEngine(form, numbered)
    pool = Pool(tuple(Agent(Caller(engine, store, form, seed=0), temperature) for temperature in (None, 0.3)))
    told = asyncio.run(explain(QUESTION, pool, Draw(0.8, 8), samples=3, protocol="hinted"))
    assert [turn.call.sampling.temperature for turn in told] == [0.8, 0.3, 0.8]
    assert len({turn.call.sampling.seed for turn in told}) == 3
    for turn in told:
        prompt = form.tokenizer.decode(turn.call.prompt_ids.tolist())
        assert f"The right answer is {QUESTION.answer}." in prompt
    asked = asyncio.run(answer(QUESTION, pool, Draw(0.8, 8), samples=2, protocol="samples"))
    assert [turn.call.prompt for turn in asked] == [form.question(QUESTION)] * 2


def test_a_failed_call_is_kept_as_an_attempt_and_tried_again(form, store):
    caller = Caller(ScriptedEngine(form, numbered, fails=lambda prompt, call: call == 0), store, form, seed=0)
    with pytest.raises(AgentArkError, match="went away"):
        asyncio.run(answer(QUESTION, Pool((Agent(caller),)), Draw(0.8, 8), protocol="single"))
    (failed,) = store.turns()
    assert (failed.attempt, failed.completion, failed.error) == (0, None, "the server went away")
    (turn,) = asyncio.run(answer(QUESTION, Pool((Agent(caller),)), Draw(0.8, 8), protocol="single"))
    assert turn.attempt == 1
    assert turn.key == failed.key
    assert store.lookup(turn.key).completion.text == turn.completion.text


def test_the_ledger_of_a_debate_is_what_the_engine_counted(form, store):
    engine = make_engine()
    settings = DebateConfig(agents=3, rounds=2, max_tokens=6)

    async def everyone():
        pool = Pool((Agent(Caller(engine, store, form, seed=0)),))
        return await asyncio.gather(*(debate(question, pool, settings) for question in (QUESTION, OTHER)))

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


class ColdEngine:
    """Every call is answered by an engine of its own."""

    model, weights, text_only = "model", "weights", False

    def generate(self, request):
        return make_engine(context=512).generate(request)


def test_agents_who_see_the_same_share_its_prefill_and_draw_what_each_would_alone(form, store, tmp_path):
    engine = make_engine(context=512)
    settings = DebateConfig(agents=4, rounds=3, max_tokens=12, layout="shared_first")

    async def everyone(engine, store):
        pool = Pool((Agent(Caller(engine, store, form, seed=0)),))
        return await asyncio.gather(*(debate(question, pool, settings) for question in (QUESTION, OTHER)))

    together = asyncio.run(everyone(engine, store))
    count = 0
    for result in together:
        alone, *later = by_round(result)
        count += len(alone[0].call.prompt_ids) - 1
        for turns in later:
            front = sum(map(len, turns[0].call.prompt[:9]))  # the question, and four answers under their titles
            assert all(turn.call.prompt[:9] == turns[0].call.prompt[:9] for turn in turns)
            count += front + sum(len(turn.call.prompt_ids) - 1 - front for turn in turns)
    assert engine.prefilled_tokens == count
    total = store.ledger()[0]
    assert total.prompt_tokens - total.cached_tokens - total.calls == count
    assert count < (total.prompt_tokens - total.calls) / 2
    with TraceStore(tmp_path / "cold.sqlite") as other:
        other.put_questions([QUESTION, OTHER])
        apart = asyncio.run(everyone(ColdEngine(), other))
    for one, other in zip(together, apart, strict=True):
        assert keys(one.turns) == keys(other.turns)
        for turn, again in zip(one.turns, other.turns, strict=True):
            assert turn.completion.ids.tobytes() == again.completion.ids.tobytes()
            assert turn.completion.logprobs.tobytes() == again.completion.logprobs.tobytes()


# Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"agents": 0},
        {"rounds": 0},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"max_tokens": 0},
        {"topology": "mesh"},
        {"topology": "sparse-0"},
        {"topology": "sparse-3"},
        {"peers": "fake"},
        {"layout": "peers_first"},
        {"history": "none"},
        {"early_stop": "soon"},
        {"aggregation": "mean"},
    ],
)
def test_debate_settings_are_checked(wrong):
    with pytest.raises(UsageError, match=f"debate.{next(iter(wrong))}"):
        DebateConfig(**wrong)
