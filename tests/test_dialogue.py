"""A debate as one answer: what a turn was shown, verbatim, in front of it; and the variants of debates held here."""

import asyncio
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from chat_families import FAMILIES, write_family
from scripted import BabblingEngine, ScriptedEngine

from agentark_jax.cli import main
from agentark_jax.data.chat import make_format
from agentark_jax.data.config import PromptConfig
from agentark_jax.data.render import PlainFormat, dialogue_example, turn_example
from agentark_jax.errors import AgentArkError
from agentark_jax.protocols.calls import Caller
from agentark_jax.protocols.config import DebateConfig
from agentark_jax.protocols.debate import debate, longest_dialogue
from agentark_jax.protocols.table import Agent, Pool
from agentark_jax.records import DEBATE, SUMMARISER, Question
from agentark_jax.tasks.grading import grader
from agentark_jax.traces.config import SelectionConfig, Variant
from agentark_jax.traces.labels import label_store, labelled_turns
from agentark_jax.traces.selection import load_selection
from agentark_jax.traces.store import TraceStore
from agentark_jax.traces.variants import select

QUESTION = Question.make("task", "debate", "Mia has 3 apples and buys 4 more. How many?", "7")


@pytest.fixture(scope="module")
def formats(tmp_path_factory, form):
    root = tmp_path_factory.mktemp("families")
    return cache(lambda name: form if name == "plain" else make_format(write_family(name, root / name), PromptConfig()))


@pytest.fixture
def store(tmp_path):
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_question(QUESTION)
        yield store


def hold(store, engines, **settings):
    """The turns of a debate, by key."""
    agents = tuple(Agent(Caller(engine, store, engine.form, seed=0)) for engine in engines)
    result = asyncio.run(debate(QUESTION, Pool(agents), DebateConfig(**settings)))
    return {turn.key: turn for turn in result.turns}


def learned(example):
    return example.ids[example.weights["completion"] > 0].tolist()


def told(form, turn, turns):
    """The answers in a turn's own prompt: every other segment, after the question (and, in plain prompts, a title)."""
    return [list(segment) for segment in turn.call.prompt[2 if isinstance(form, PlainFormat) else 1 : -1 : 2]]


@pytest.mark.parametrize("name", ["plain", *sorted(FAMILIES)])
def test_a_dialogue_has_the_very_ids_of_the_debate(formats, store, name):
    form = formats(name)
    turns = hold(store, [BabblingEngine(form)], agents=3, rounds=3)
    for turn in turns.values():
        if turn.call.round == 0:
            with pytest.raises(AgentArkError, match=f"turn {turn.key} cannot .* it was shown no other turn"):
                dialogue_example(form, QUESTION, turn, turns, variant="dialogue")
            continue
        example = dialogue_example(form, QUESTION, turn, turns, variant="dialogue", trace_keys=["k"])
        prompt = [token for segment in form.question(QUESTION) for token in segment]
        shown = told(form, turn, turns)
        own = turn.call.round
        assert len(shown) == own + 2
        again, another, better = (list(form.tokenizer.encode(words)) for words in form.telling)
        expected = list(shown[0])
        for place, ids in enumerate(shown[1:], 1):
            expected += (again if place < own else another) + ids
        expected += better + turn.completion.ids.tolist()
        assert learned(example) == expected, "all of the answer has loss, and its end token stands last"
        assert example.ids[: len(prompt)].tolist() == prompt
        assert len(example.ids) == len(prompt) + len(expected)
        assert set(example.weights["completion"][len(prompt) :]) == {1.0}
        assert not set(form.stop_ids) & set(expected[:-1])
        assert expected[-1] in form.stop_ids
        assert example.retokenised
        assert (example.question_id, example.variant, example.trace_keys) == (QUESTION.id, "dialogue", ("k",))


def test_a_dialogue_reads_as_written(formats, store):
    said = iter(f"{number}. The answer is {number}." for number in range(9))
    for name, text in (
        ("plain", "{}\nAnother answer:{}\nBetter answer:{}"),
        ("llama3", "{}\n\nAnother answer:\n{}\n\nBetter answer:\n{}"),
    ):
        form = formats(name)
        engine = ScriptedEngine(form, lambda prompt, sampling: next(said), model=name)
        turns = hold(store, [engine], agents=2, rounds=2)
        (turn,) = (turn for turn in turns.values() if turn.call.round and turn.call.agent == 1)
        first = {t.call.agent: form.tokenizer.decode(t.completion.ids) for t in turns.values() if t.call.round == 0}
        example = dialogue_example(form, QUESTION, turn, turns, variant="dialogue")
        better = form.tokenizer.decode(turn.completion.ids)
        assert form.tokenizer.decode(learned(example)) == text.format(first[1], first[0], better)


@pytest.mark.parametrize("student", ["plain", "qwen3", "llama3"])
def test_what_another_tokenizer_said_is_encoded_once(formats, store, student):
    """A team of two models: each part is verbatim for a student of its tokenizer, and read as text by all others."""
    engines = [
        ScriptedEngine(formats(name), lambda prompt, sampling, name=name: f"{name} says the answer is 7.", model=name)
        for name in ("plain", "llama3")
    ]
    turns = hold(store, engines, agents=3, rounds=2)
    form = formats(student)
    for turn in (turn for turn in turns.values() if turn.call.round):
        example = dialogue_example(form, QUESTION, turn, turns, variant="dialogue")
        assert example.retokenised
        ids = learned(example)
        assert not set(form.stop_ids) & set(ids[:-1])
        parts = [turns[key] for key in turn.call.parents]
        words = [form.tokenizer.encode(each) for each in form.telling]
        expected = []
        for part in parts:
            if part.call.tokenizer == form.tokenizer.hash:
                shown = part.completion.ids.tolist()[:-1]
            else:
                shown = list(form.shown(form.response(part.completion.text)))
            expected += [*(words[1] if expected else ()), *shown]
        expected += [*words[2], *learned(turn_example(form, QUESTION, turn, variant="v"))]
        assert ids == expected
        assert ids[-1] == form.stop_ids[0]
        spoken = form.tokenizer.decode(ids)
        assert [spoken.count(name + " says") for name in ("plain", "llama3")] == (
            [3, 1] if turn.call.agent != 1 else [2, 2]
        )


def test_a_thought_of_an_earlier_answer_is_not_told(store, tmp_path):
    """Where the template drops earlier thoughts no prompt shows them, nor a dialogue; the last answer keeps its own."""
    form = make_format(write_family("qwen3", tmp_path / "qwen3"), PromptConfig(thinking=True))
    engine = ScriptedEngine(form, lambda prompt, sampling: "<think>\nhm\n</think>\n\nThe answer is 7.")
    turns = hold(store, [engine], agents=2, rounds=2)
    turn = next(turn for turn in turns.values() if turn.call.round)
    ids = learned(dialogue_example(form, QUESTION, turn, turns, variant="dialogue"))
    assert form.tokenizer.spell(ids).count("hm") == 1
    assert form.tokenizer.decode(ids).count("The answer is 7.") == 3
    assert ids[-len(turn.completion.ids) :] == turn.completion.ids.tolist()


def test_a_dialogue_names_the_turn_that_it_lacks(formats, store):
    turns = hold(store, [BabblingEngine(formats("plain"))], agents=2, rounds=2)
    turn = next(turn for turn in turns.values() if turn.call.round)
    lost = turn.call.parents[1]
    with pytest.raises(AgentArkError, match=rf"turn {turn.key} cannot .* not all at hand \({lost}\)"):
        dialogue_example(formats("plain"), QUESTION, turn, {k: v for k, v in turns.items() if k != lost}, variant="d")


@pytest.mark.parametrize(("history", "topology"), [("all", "full"), ("last", "full"), ("all", "sparse-1")])
@pytest.mark.parametrize("name", ["plain", "gemma3"])
def test_no_dialogue_is_longer_than_the_longest(formats, store, name, history, topology):
    """Where every answer is as long as it may be, the dialogues of the last round are."""

    class Wordy(BabblingEngine):
        async def generate(self, request):
            ids = np.full(request.sampling.max_tokens, self.form.tokenizer.ordinary_ids[request.sampling.seed % 50])
            completion = await super().generate(request)
            return replace(completion, ids=ids.astype(np.int32), logprobs=np.zeros(len(ids), "f4"), finish="length")

    form = formats(name)
    settings = {"agents": 3, "rounds": 3, "max_tokens": 9, "history": history, "topology": topology}
    turns = hold(store, [Wordy(form)], **settings)
    lengths = [
        len(learned(dialogue_example(form, QUESTION, turn, turns, variant="d")))
        for turn in turns.values()
        if turn.call.round
    ]
    assert max(lengths) == longest_dialogue(form, DebateConfig(**settings))


def keys_of(trajectories):
    return [trajectory.turn_key for trajectory in trajectories]


@pytest.mark.parametrize("topology", ["full", "ring", "none"])
def test_a_debate_with_a_summariser_becomes_every_variant(formats, store, tmp_path, topology):
    """From calls to examples: the summary is the summariser's, and dialogues are what was shown."""
    form = formats("plain")
    numbers = {0: "6", 1: "7", 2: "8"}

    def script(prompt, sampling):
        if "Weigh these answers" in prompt:
            return "All in all. The answer is 7."
        number = "7" if "Better answer:" in prompt else numbers[sampling.seed % 3]
        return f"{sampling.seed % 1000}. The answer is {number}."

    turns = hold(store, [ScriptedEngine(form, script)], agents=4, rounds=3, topology=topology, aggregation=SUMMARISER)
    judge = grader("final_answer")
    label_store(store, judge, judge.id)
    rows = labelled_turns(store, judge.id, protocol=DEBATE)
    assert {row.role for row in rows} == {"debater", SUMMARISER}

    def chosen(variant: Variant, rows=rows):
        return select(rows, SelectionConfig(variant, per_question=9), store.completions).trajectories

    (summary,) = chosen("summary")
    assert turns[summary.turn_key].call.role == SUMMARISER
    assert "All in all" in turns[summary.turn_key].completion.text
    assert turn_example(form, QUESTION, turns[summary.turn_key], variant="summary").ids[-1] == form.tokenizer.eos_id
    dialogues = chosen("dialogue")
    assert {t.turn_key for t in dialogues} == {t.turn_key for t in chosen("corrective_first")}
    assert [t.corrective for t in dialogues] == sorted((t.corrective for t in dialogues), reverse=True)
    peers = {"full": 3, "ring": 2, "none": 0}[topology]
    for trajectory in dialogues:
        turn = turns[trajectory.turn_key]
        assert trajectory.trace_keys == (*turn.call.parents, turn.key)
        assert [turns[key].call.agent == turn.call.agent for key in trajectory.trace_keys] == (
            [True, True] + [False] * peers + [True]
        )
        parents = {found.key: found for found in store.turns(keys=trajectory.trace_keys)}
        example = dialogue_example(form, QUESTION, turn, parents, variant="dialogue", trace_keys=trajectory.trace_keys)
        texts = [turns[key].completion.text for key in trajectory.trace_keys]
        titles = ["My answer:"] + ["Another answer:"] * peers + ["Better answer:"]
        expected = texts[0] + "".join(f"\n{title}\n{text}" for title, text in zip(titles, texts[1:], strict=True))
        assert form.tokenizer.decode(learned(example)).strip() == expected
        # Without our words, the example is what the selection counts.
        words = [form.tokenizer.encode("\n" + title) for title in titles]
        assert len(trajectory.completion_ids) == len(learned(example)) - sum(map(len, words))

    assert main(["traces", "select", str(store.path), "--grader", "final_answer", "--out", str(tmp_path / "out")]) == 0
    assert keys_of(load_selection(tmp_path / "out" / "summary.parquet").trajectories) == [summary.turn_key]
    written = keys_of(load_selection(tmp_path / "out" / "dialogue.parquet").trajectories)
    assert written == keys_of(dialogues)[: SelectionConfig.per_question]
