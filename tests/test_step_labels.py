"""Labels of steps: from a debate's consensus, from where it locates an error, from continuations and from a judge."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from scripted import ScriptedEngine
from test_store import make_call

from agentark_jax.data.steps import steps
from agentark_jax.engines.base import TooLong
from agentark_jax.records import DEBATER, JUDGE, Completion, Question, Sampling, Turn
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems, exact_step_truth
from agentark_jax.traces.labels import grade_turns, labelled_turns
from agentark_jax.traces.step_labels import (
    Continued,
    StepJudge,
    StepLabels,
    agreed,
    by_consensus,
    by_continuations,
    by_debate,
    continuations,
    first_abandoned,
    first_rejected,
    step_texts,
)
from agentark_jax.traces.store import TraceStore

TASK = WordProblems(TaskConfig())
# (3 + 4) * 2
SUM = {"start": 3, "operations": ["+", "*"], "operands": [4, 2], "values": [7, 14]}
QUESTION = Question.make("word_problems", "debate", "Three and four, twice?", "14", **SUM)
RIGHT = "3+4=7\n7*2=14\nThe answer is 14."
SLIP = "3+4=7\n7*2=15\nThe answer is 15."
LOST = "3+4=8\n8*2=16\nThe answer is 16."
REJECTING = "3+4=8 is wrong.\n3+4=7\n7*2=14\nThe answer is 14."


def debate(store, form, *rounds, role=DEBATER):
    """Records what each agent said in each round (None: it failed), after seeing all of the one before."""
    keys: dict[tuple[int, int], str] = {}
    store.put_question(QUESTION)
    for number, said in enumerate(rounds):
        parents = tuple(key for (round, _), key in keys.items() if round == number - 1)
        for agent, text in enumerate(said):
            if text is None:
                continue
            place = {"question_id": QUESTION.id, "round": number, "role": role, "protocol": "debate"}
            call = replace(make_call(agent=agent), **place, parents=parents)
            ids = np.asarray(form.response(text), np.int32)
            finish = "length" if text.endswith("…") else "stop"
            store.record(Turn(call, 0, Completion(ids, np.zeros(len(ids), np.float32), text, finish, 5, 0, 0.1)))
            keys[number, agent] = call.key
    store.put_labels(grade_turns(store.turns(), {QUESTION.id: QUESTION}, TASK.grade, TASK.grader_id))
    return keys


@pytest.fixture
def heard(form, tmp_path):
    """What consensus and debate say of a debate: the first errors by (round, agent), None for no error."""

    def of(*rounds, **options):
        with TraceStore(tmp_path / f"{len(list(tmp_path.glob('*.sqlite')))}.sqlite") as store:
            return sources(store, form, debate(store, form, *rounds, **options))

    return of


def sources(store, form, keys):
    rows = labelled_turns(store, TASK.grader_id)
    said = store.completions(keys.values())
    texts = step_texts(said, form.tokenizer)
    places = {key: place for place, key in keys.items()}
    parents = {key: turn.parents for key, turn in said.items()}
    found = []
    for labels in (by_consensus(rows, texts), by_debate(rows, texts, parents)):
        assert all(len(each.right) == len(texts[each.key]) and each.tokens == 0 for each in labels)
        found.append({places[each.key]: each.first_error for each in labels})
    return found


def test_consensus_labels_whole_answers_and_the_debate_the_step_that_is_abandoned(heard):
    consensus, located = heard([RIGHT, SLIP, LOST], [RIGHT, RIGHT, LOST])
    right = {(0, 0): None, (1, 0): None, (1, 1): None}
    assert consensus == {**right, (0, 1): 0, (0, 2): 0, (1, 2): 0}
    assert located == {**right, (0, 1): 1}, "the third agent gave nothing up, and nobody told it to"


def test_a_peer_of_the_consensus_names_the_step(heard):
    assert heard([RIGHT, RIGHT, LOST], [RIGHT, REJECTING, LOST], [RIGHT, RIGHT, LOST])[1] == {
        **{(round, agent): None for round in range(3) for agent in (0, 1)},
        (0, 2): 0,
    }, "what was said in the second round was shown to agents who did not reject it"


def test_an_agent_that_quotes_all_that_it_said_may_name_the_step_itself(heard):
    quoting = "3+4=8\n8*2=16\nThe answer is 16.\nNo, 3+4=8 is wrong.\nThe answer is 14."
    assert heard([RIGHT, RIGHT, LOST], [RIGHT, RIGHT, quoting])[1][0, 2] == 0


def test_rejections_by_those_who_are_wrong_and_by_those_who_were_not_shown_the_step_count_for_nothing(heard):
    outvoted = "3+4=8 is wrong.\nThe answer is 15."
    _, located = heard([RIGHT, outvoted, LOST], [RIGHT, outvoted, LOST], [RIGHT, RIGHT, LOST])
    assert not {(0, 2), (1, 2), (2, 2)} & located.keys()
    assert heard([REJECTING, RIGHT, LOST])[1] == {(0, 0): None, (0, 1): None}


def test_the_next_answer_of_the_consensus_corrects_and_not_one_that_is_wrong_in_another_way(heard):
    assert heard([RIGHT, RIGHT, SLIP], [RIGHT, RIGHT, LOST], [RIGHT, RIGHT, RIGHT])[1] == {
        **{(round, agent): None for round in range(3) for agent in range(2)},
        (2, 2): None,
        (0, 2): 1,
        (1, 2): 0,
    }


def test_without_a_consensus_or_a_readable_answer_nothing_is_known(heard):
    assert heard([RIGHT, SLIP, RIGHT], [RIGHT, SLIP, LOST]) == [{}, {}]
    for said in ("3+4=6\nI cannot tell", "3+4=6\nThe answer is 16. So…"):
        others = {(0, 1): None, (0, 2): None, (1, 0): None}
        assert heard([said, RIGHT, RIGHT], [RIGHT, None, None]) == [others, others]


def test_what_judges_of_debates_say_is_neither_labelled_nor_counted(heard):
    assert heard([SLIP, SLIP, SLIP], role=JUDGE) == [{}, {}]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("a\nb\nc", "a\nd\ne", 1),
        ("a\nb\nc", "x\nA \n y\nb.\nd", 2),
        ("a\nb\nc", "b\na\nd", 1),  # b stands before a
        ("a\na\nb", "a\nb", 1),
        ("a\nb", "x\ny", 0),
        ("a\nb", "Before I said:\na\nb\nNo.\nc", None),
        ("a", "", 0),
        ("", "a", None),
    ],
)
def test_the_first_abandoned_step(before, after, expected):
    assert first_abandoned(before.splitlines(), after.splitlines()) == expected


@pytest.mark.parametrize(
    ("critique", "expected"),
    [
        ("3+4=8 is wrong", 0),
        ("Your second step, 8*2=16., is not right", 1),
        ("The error is: 8*2=16. And 3+4=8 is incorrect", 0),
        ("It should be 7, not 3+4=8!", 0),
        ("3+4=8 is right, no mistake", None),
        ("3+4=8 is right", None),
        ("13+4=8 is wrong, and so is 3+4=81", None),
        ("that is wrong", None),
    ],
)
def test_the_first_rejected_step(critique, expected):
    assert first_rejected(["3+4=8\n", "8*2=16\n", "...\n"], critique.split(". ")) == expected


def test_continuations_of_each_step_are_counted_and_the_last_step_is_the_answers(form):
    ids = form.response(SLIP)
    found = steps(ids, form.tokenizer)
    asked = []

    async def continuing(prefix):
        asked.append(form.tokenizer.decode(prefix).strip())
        return Continued([True, False, len(asked) == 1, False], 10)

    labels = asyncio.run(by_continuations("k", ids, found, False, continuing))
    assert labels == StepLabels("k", "continuations", (0.5, 0.25, 0.0), 20)
    assert asked == ["3+4=7", "3+4=7\n7*2=15"]
    assert asyncio.run(by_continuations("k", ids, found, True, continuing)).right[-1] == 1


def test_an_engine_continues_what_was_said(form):
    requests = []
    rest = {"3+4=7": ["7*2=14\nThe answer is 14.", "The answer is 15.", "7*2=14\nThe answer is 14.", "too long"]}

    class Continuing(ScriptedEngine):
        async def generate(self, request):
            requests.append(request)
            said = form.tokenizer.decode(request.prompt_ids.tolist()).split("Answer:")[1].strip()
            text = "\n" + rest[said].pop(0)
            if text == "\ntoo long":
                raise TooLong("no room")
            ids = np.asarray([*form.tokenizer.encode(text), form.tokenizer.eos_id], np.int32)
            finish = "length" if len(rest[said]) == 1 else "stop"
            return Completion(ids, np.zeros(len(ids), np.float32), text, finish, len(request.prompt_ids), 0, 0.1)

    sampling = Sampling(0.7, 30, form.stop_ids, seed=3)
    ids = form.response(SLIP)
    first = steps(ids, form.tokenizer)[0]
    made = continuations(Continuing(form, None), form, QUESTION, TASK.grade, sampling, 4)
    found = asyncio.run(made(ids[: first.end]))
    assert found.right == [True, False, False, False], "the third was cut off, the fourth has no room"
    assert found.tokens == sum(len(each.prompt_ids) for each in requests[:3]) + sum(
        len(form.tokenizer.encode("\n" + text)) + 1
        for text in ("7*2=14\nThe answer is 14.", "The answer is 15.", "7*2=14\nThe answer is 14.")
    )
    assert len({request.sampling.seed for request in requests}) == 4
    prompt = [token for segment in form.question(QUESTION) for token in segment]
    assert requests[0].prompt_ids.tolist() == [*prompt, *ids[: first.end]], "sampled ids are continued as they are"


def judged(engine, form, text):
    texts = [step.text for step in steps(form.response(text), form.tokenizer)]
    return asyncio.run(StepJudge(engine, form).labels("k", QUESTION, texts))


def test_a_judge_reads_on_until_a_step_is_wrong(form):
    engine = ScriptedEngine(form, lambda prompt, sampling: "false" if "Last step:\n7*2=15" in prompt else "true")
    labels = judged(engine, form, SLIP)
    assert labels.right == (1.0, 0.0, 0.0)
    assert labels.source == StepJudge(engine, form).id
    assert "scripted" in labels.source
    assert len(engine.prompts) == 2
    assert [("7*2=15" in prompt, "The answer" in prompt) for prompt in engine.prompts] == [
        (False, False),
        (True, False),
    ]
    assert labels.tokens == sum(len(form.tokenizer.encode(prompt)) for prompt in engine.prompts) + sum(
        len(form.response(said)) for said in ("true", "false")
    ) + len(engine.prompts)
    assert judged(engine, form, RIGHT).right == (1.0, 1.0, 1.0)


def test_a_judge_that_does_not_say_has_no_labels(form):
    assert judged(ScriptedEngine(form, lambda prompt, sampling: "well"), form, SLIP) is None

    class Narrow(ScriptedEngine):
        async def generate(self, request):
            raise TooLong("no room")

    assert judged(Narrow(form, None), form, SLIP) is None


def test_sources_agree_on_a_turn_where_they_find_the_same_first_error():
    soft = [
        StepLabels("a", "c", (0.5, 0.0, 0.25), 10),
        StepLabels("b", "c", (0.5, 0.25, 1.0), 10),
        StepLabels("c", "c", (0.0, 0.5), 10),
        StepLabels("d", "c", (0.5,), 10),
    ]
    hard = [
        StepLabels("a", "j", (1.0, 0.0, 0.0), 3),
        StepLabels("b", "j", (1.0, 1.0, 1.0), 3),
        StepLabels("c", "j", (1.0, 0.0), 3),
    ]
    assert agreed(soft, hard) == [
        StepLabels("a", "c&j", (1.0, 0.0, 0.0), 13),
        StepLabels("b", "c&j", (1.0, 1.0, 1.0), 13),
    ]


def test_labels_are_of_the_steps_whose_truth_is_known(form):
    for text, expected in ((RIGHT, (True, True, True)), (SLIP, (True, False, False))):
        texts = [step.text for step in steps(form.response(text), form.tokenizer)]
        assert exact_step_truth(QUESTION, texts) == expected
