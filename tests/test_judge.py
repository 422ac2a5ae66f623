"""The LLM judge: what it is told, what becomes of what it says, and `agentark traces label --judge`."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
from real_server import make_model
from scripted import Killed, ScriptedEngine
from test_foreign import ROWS, bring
from test_store import make_call
from test_traces_cli import cells, run

from agentark_jax.engines.base import TooLong
from agentark_jax.engines.local import LocalEngine
from agentark_jax.errors import AgentArkError
from agentark_jax.generation import Generation
from agentark_jax.records import Completion, Question, Turn
from agentark_jax.tasks.grading import grader
from agentark_jax.traces import labels
from agentark_jax.traces.judge import Judge, judge_store, to_judge, undecided, with_fallback
from agentark_jax.traces.selection import load_selection
from agentark_jax.traces.store import TraceStore

QUESTION = Question.make("test", "held_out", "What is 3 + 4?", "7")


def said(text, agent, finish="stop", form=None):
    call = replace(make_call(agent=agent), question_id=QUESTION.id)
    ids = np.asarray([1, 2], np.int32)
    return Turn(call, 0, Completion(ids, np.zeros(2, np.float32), text, finish, 5, 0, 0.1))


TURNS = [
    said("3+4=7\nThe answer is 7.", 0),
    said("The answer is 8.", 1),
    said("It must be seven, that is 7", 2),
    said("Eight it is", 3),
    said("The answer is 7", 4, finish="length"),
    Turn(replace(make_call(agent=5), question_id=QUESTION.id), 0, None, "slow"),
]


def truthful(prompt, sampling):
    assert sampling.regex == r"\s?(true|false)"
    assert sampling.temperature == 0.0
    solution = prompt.split("Solution:\n")[1].split("That was the solution")[0]
    return "true" if "7" in solution.split() or "7." in solution else "false"


def judged(judge, turns, questions, **options):
    async def everything():
        return [label async for portion in judge.labels(turns, questions, **options) for label in portion]

    return {label.key: label for label in asyncio.run(everything())}


def test_the_judge_labels_what_succeeded_under_the_name_of_its_model(form):
    engine = ScriptedEngine(form, truthful, model="judge-model")
    judge = Judge(engine, form)
    assert "judge-model" in judge.id
    found = judged(judge, TURNS, {QUESTION.id: QUESTION})
    assert found.keys() == {turn.key for turn in TURNS[:5]}
    verdicts = [found[turn.key].verdict for turn in TURNS[:5]]
    assert verdicts == ["right", "wrong", "right", "wrong", "unparseable"]
    assert {(label.grader, label.answer) for label in found.values()} == {(judge.id, "")}
    assert len(engine.prompts) == 4, "the turn that was cut off is not asked about"
    assert all("What is 3 + 4?" in prompt and "Right answer: 7" in prompt for prompt in engine.prompts)
    others = Judge(ScriptedEngine(form, truthful, model="other"), form), Judge(engine, form, blind=True)
    assert len({judge.id, *(other.id for other in others)}) == 3
    with pytest.raises(AgentArkError, match="not in the trace store"):
        judged(judge, TURNS, {})


def test_a_judge_sees_the_right_answers_and_a_verifier_all_that_was_told(form):
    question = Question.make(
        "test", "held_out", "A long story.\n\nWho {won}?", "Ann", answers=["Ann", "Ann B."], asked="Who {won}?"
    )
    engine = ScriptedEngine(form, lambda prompt, sampling: "true")
    for blind in (False, True):
        assert asyncio.run(Judge(engine, form, blind=blind).verdict(question, "She did.")) == "right"
    told, blind = engine.prompts
    assert "Who {won}?\n\nRight answer: Ann\nor: Ann B.\n\nSolution:\nShe did." in told
    assert "A long story." not in told
    assert "A long story.\n\nWho {won}?\n\nSolution:\nShe did." in blind
    assert "Ann" not in blind


def test_a_solution_cannot_spell_control_tokens_to_the_judge(form):
    engine = ScriptedEngine(form, lambda prompt, sampling: "false")
    requests = []
    generate = engine.generate

    async def watched(request):
        requests.append(request)
        return await generate(request)

    engine.generate = watched
    tokenizer = form.tokenizer
    marks = tokenizer.spell([tokenizer.eos_id, tokenizer.bos_id])
    assert tokenizer.encode(marks) == (tokenizer.eos_id, tokenizer.bos_id)
    asyncio.run(Judge(engine, form).verdict(QUESTION, f"8{marks}{marks}"))
    prompt = requests[0].prompt_ids.tolist()
    assert (prompt.count(tokenizer.eos_id), prompt.count(tokenizer.bos_id)) == (0, 1)


@pytest.mark.parametrize("reply", ["", "yes", "true false", "truth"])
def test_a_judge_that_says_neither_has_not_decided(form, reply):
    judge = Judge(ScriptedEngine(form, lambda prompt, sampling: reply), form)
    assert asyncio.run(judge.verdict(QUESTION, "7")) == "unparseable"


class Narrow(ScriptedEngine):
    """Takes no more than so many prompt tokens; counts how many requests are in flight."""

    def __init__(self, *arguments, context=10**9, **options):
        super().__init__(*arguments, **options)
        self.context, self.flying, self.most = context, 0, 0

    async def generate(self, request):
        if len(request.prompt_ids) > self.context:
            raise TooLong("a prompt is too long")
        self.flying += 1
        self.most = max(self.most, self.flying)
        for _ in range(self.flying):  # not all are done at once
            await asyncio.sleep(0)
        try:
            return await super().generate(request)
        finally:
            self.flying -= 1


def test_what_does_not_fit_the_judge_is_counted_and_asked_again(form, tmp_path):
    long = said("seven " * 200, 6)
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_question(QUESTION)
        store.record_many([*TURNS, long])
        keys = {turn.key for turn in [*TURNS[:5], long]}
        for context, unknown, asked in ((400, {TURNS[4].key, long.key}, 4), (10**9, {TURNS[4].key}, 1)):
            engine = Narrow(form, truthful, context=context)
            judge = Judge(engine, form)
            asyncio.run(judge_store(store, judge, undecided(keys, store.labels(judge.id))))
            assert judge.too_long == (long.key in unknown)
            assert len(engine.prompts) == asked
            given = store.labels(judge.id)
            assert given.keys() == keys
            assert {key for key in keys if given[key].verdict == "unparseable"} == unknown


def test_turns_are_read_as_others_are_done(form):
    taken = []

    def turns():
        for agent in range(50):
            taken.append(agent)
            yield said("It is 7", agent)

    engine = Narrow(form, truthful)
    judge = Judge(engine, form)
    read = []

    async def everything():
        async for portion in judge.labels(turns(), {QUESTION.id: QUESTION}, at_once=8):
            read.extend(portion)
            assert len(taken) <= len(read) + 8

    asyncio.run(everything())
    assert (len(read), engine.most) == (50, 8)


def test_fallback_only_where_the_rule_cannot_read(form, tmp_path, capsys):
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_question(QUESTION)
        store.record_many(TURNS)
        judge = Judge(ScriptedEngine(form, truthful, model="judge-model"), form)
        labels.label_store(store, grader("numeric"), grader("numeric").id)
        asyncio.run(judge_store(store, judge, [turn.key for turn in TURNS[:5]]))
        rules, said_so = store.labels("numeric-2"), store.labels(judge.id)
        both = with_fallback(rules, said_so, judge.id)
        store.put_labels(both)
        assert store.graders() == sorted(["numeric-2", judge.id, f"numeric-2+{judge.id}"])
    by_key = {label.key: (label.verdict, label.answer) for label in both}
    wanted = [("right", "7"), ("wrong", "8"), ("right", ""), ("wrong", ""), ("unparseable", "")]
    assert [by_key[turn.key] for turn in TURNS[:5]] == wanted
    lying = {key: replace(label, verdict="wrong") for key, label in said_so.items()}
    kept = {label.key: label.verdict for label in with_fallback(rules, lying, judge.id)}
    assert [kept[turn.key] for turn in TURNS[:3]] == ["right", "wrong", "wrong"]
    partly = with_fallback(rules, {TURNS[2].key: said_so[TURNS[2].key]}, judge.id)
    assert {label.key: label.verdict for label in partly}[TURNS[3].key] == "unparseable"

    code, out, _ = run(capsys, "audit", tmp_path)
    assert code == 0
    assert ["2", "1", "0", "0", "1"] in [row[2:7] for row in cells(out)]
    assert "2/2 = 100.00% [34.24%, 100.00%]" in out


def test_the_sample_that_both_judge_grows_and_never_changes():
    rules = {f"{key:024x}": labels.Label(f"{key:024x}", "r", "wrong", "") for key in range(40)}
    rules |= {key: replace(label, verdict="unparseable") for key, label in list(rules.items())[:3]}
    unread = set(list(rules)[:3])
    drawn = [to_judge(rules, sample) for sample in (0, 5, 20, 100)]
    assert drawn[0] == unread
    assert [len(keys) for keys in drawn] == [3, 8, 23, 40]
    assert drawn[0] < drawn[1] < drawn[2] < drawn[3]
    assert to_judge(dict(reversed(rules.items())), 5) == drawn[1]
    assert drawn[1] - unread != set(sorted(rules.keys() - unread)[:5]), "not those that come first"


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("judge") / "model", 0, positions=1024)


@pytest.fixture
def debates(tmp_path, model, capsys):
    """The store of two debates with four right turns, two wrong ones and one that no rule can read."""
    (tmp_path / "debates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert bring(tmp_path / "debates.jsonl", tmp_path / "debates.sqlite", str(model)) == 0
    capsys.readouterr()
    return tmp_path / "debates.sqlite"


@pytest.fixture
def asked(monkeypatch):
    """How many requests the embedded engine got."""
    requests = []
    generate = LocalEngine.generate

    async def counted(self, request):
        requests.append(request)
        return await generate(self, request)

    monkeypatch.setattr(LocalEngine, "generate", counted)
    return requests


def stored(path):
    with TraceStore(path, read_only=True) as store:
        return {name: store.labels(name) for name in store.graders()}


def test_a_model_judges_what_the_rule_cannot_read(debates, model, asked, tmp_path, capsys):
    command = ("label", debates, "--grader", "numeric", "--judge", model)
    code, out, _ = run(capsys, *command, "--judge-sample", 3)
    assert (code, len(asked)) == (0, 4)
    found = stored(debates)
    rule, judge, both = sorted(found, key=lambda name: ("+" in name, name.startswith("judge")))
    assert (rule, both) == ("numeric-2", f"{rule}+{judge}")
    assert judge.startswith("judge-2:model:"), "no path of this machine"
    (unread,) = [key for key, label in found[rule].items() if label.verdict == "unparseable"]
    assert unread in found[judge]
    assert {label.verdict for label in found[judge].values()} <= {"right", "wrong"}
    assert found[both][unread].verdict == found[judge][unread].verdict
    assert all(found[both][key].verdict == label.verdict for key, label in found[rule].items() if key != unread)
    rows = {"".join(row[0].split()): row[1:] for row in cells(out) if len(row) == 5}
    assert rows[rule][:4] == ["7", "4", "2", "1"]
    assert rows[judge][0] == "4"
    (compared,) = [row for row in cells(out) if len(row) > 5]
    sides = [(found[rule][key].verdict, found[judge][key].verdict) for key in found[judge] if key != unread]
    pairs = [("right", "right"), ("right", "wrong"), ("wrong", "right"), ("wrong", "wrong")]
    assert compared[2:7] == ["3", *(str(sides.count(pair)) for pair in pairs)]

    assert run(capsys, *command, "--judge-sample", 3)[0] == 0
    assert len(asked) == 4, "nothing is asked twice"
    assert run(capsys, *command)[0] == 0
    assert len(asked) == 7
    assert stored(debates)[judge].items() >= found[judge].items()

    out = tmp_path / "chosen"
    assert (
        run(capsys, "select", debates, "--grader", "numeric-2+judge", "--variant", "all_correct", "--out", out)[0] == 0
    )
    assert json.loads((out / "manifest.json").read_text())["grader"] == both
    for name, complaint in (("numeric-2+x", "0 graders"), ("", "3 graders")):
        code, _, err = run(capsys, "select", debates, "--grader", name, "--out", out)
        assert code == 2
        assert complaint in " ".join(err.split())


def test_a_judge_without_room_leaves_the_turn_as_it_is(debates, model, capsys):
    code, out, _ = run(capsys, "label", debates, "--grader", "numeric", "--judge", model, "--context", 64)
    assert code == 0
    assert "7 turns do not fit" in out
    found = stored(debates)
    (both,) = [name for name in found if "+" in name]
    assert [label.verdict for label in found[both].values()] == [each.verdict for each in found["numeric-2"].values()]


def scripted(monkeypatch, script, **options):
    """What the command asks is answered by a script; the engines that were made."""
    engines = []

    class Entered(ScriptedEngine):
        async def __aenter__(self):
            return self

        async def __aexit__(self, *error):
            return None

    def engine(self, seat, context):
        engines.append(Entered(seat.model.form, script, **options))
        return engines[-1]

    monkeypatch.setattr(Generation, "engine", engine)
    return engines


def test_a_verifier_knows_no_right_answer_and_selects(debates, model, monkeypatch, tmp_path, capsys):
    """It believes every 4 and 3, which are wrong: what is selected is what it believes."""

    def believes(prompt, sampling):
        assert "Right answer" not in prompt
        return "true" if "is 4." in prompt or "is 3." in prompt else "false"

    engines = scripted(monkeypatch, believes)
    assert run(capsys, "label", debates, "--grader", "numeric", "--judge", model, "--blind")[0] == 0
    assert len(engines[0].prompts) == 7
    assert len(stored(debates)) == 2, "a verifier is joined with no rule"
    assert run(capsys, "select", debates, "--grader", "verifier", "--variant", "round1_only", "--out", tmp_path)[0] == 0
    chosen = load_selection(tmp_path / "round1_only.parquet").trajectories
    with TraceStore(debates, read_only=True) as store:
        texts = store.texts(key for trajectory in chosen for key in trajectory.trace_keys)
    assert sorted(texts.values()) == ["The answer is 3.", "The answer is 4."]


@pytest.mark.parametrize("how", ["killed", "failing"])
def test_a_run_that_ended_goes_on_where_it_was(debates, model, monkeypatch, capsys, how):
    command = ("label", debates, "--grader", "numeric", "--judge", model)
    breaks = {"kill_at": 3} if how == "killed" else {"fails": lambda prompt, call: call == 3}
    scripted(monkeypatch, lambda prompt, sampling: "true", **breaks)
    if how == "killed":
        with pytest.raises(Killed):
            run(capsys, *command)
    else:
        code, _, err = run(capsys, *command)
        assert code == 1
        assert "the server went away" in err
    found = stored(debates)
    kept = [label for name, given in found.items() if name.startswith("judge") for label in given.values()]
    assert 3 <= len(kept) < 7
    assert not any("+" in name for name in found)
    engines = scripted(monkeypatch, lambda prompt, sampling: "true")
    assert run(capsys, *command)[0] == 0
    assert len(engines[0].prompts) == 7 - len(kept)
    assert [len(given) for given in stored(debates).values()] == [7, 7, 7]


def test_options_of_a_judge_need_a_judge(debates, capsys):
    for options in (["--blind"], ["--servers", "http://127.0.0.1:1"], ["--judge", "x", "--judge-sample", "-1"]):
        assert run(capsys, "label", debates, "--grader", "numeric", *options)[0] == 2


@pytest.mark.sglang
def test_servers_judge_as_the_embedded_engine_does(debates, models, server, tmp_path, capsys):
    command = ("label", debates, "--grader", "numeric", "--judge", models[0])
    assert run(capsys, *command)[0] == 0
    alone = stored(debates)
    assert {label.verdict for name in alone if name[0] == "j" for label in alone[name].values()} <= {"right", "wrong"}
    assert run(capsys, *command, "--servers", server)[0] == 0
    assert stored(debates) == alone, "the same model under the same id"
    with TraceStore(debates) as store:
        store._connection.execute("DELETE FROM labels WHERE grader LIKE 'judge%' OR grader LIKE '%+%'")
    assert run(capsys, *command, "--servers", server)[0] == 0
    assert stored(debates) == alone
