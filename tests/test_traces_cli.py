"""`agentark traces`: what it prints and writes, its exit codes, and that no model output reaches the terminal raw."""

import re
import time

import numpy as np
import pytest
from rich.progress import Progress
from test_exchange import EVERY, LABELS, exported, make_store
from test_store import make_call, make_turn, tamper, text_only

from agentark_jax.cli import main
from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.progress import Bar, _Rate
from agentark_jax.records import Completion, Label, Turn
from agentark_jax.traces.store import TraceStore
from agentark_jax.traces_cli import plain


@pytest.fixture
def path(tmp_path):
    return make_store(tmp_path / "traces.sqlite", EVERY, LABELS)


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["traces", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]


def test_stats_add_up_and_cost_what_the_prices_say(capsys, path):
    code, out, _ = run(capsys, "stats", path, "--prices", "2,1,10")
    assert code == 0
    assert "2 questions, 7 calls" in out
    assert cells(out) == [
        ["debate", "debater", "0", "7", "4", "35", "14", "28", "1.8", "0.0003"],
        ["all", "", "", "7", "4", "35", "14", "28", "1.8", "0.0003"],
    ]
    code, out, _ = run(capsys, "stats", path.parent, "--by", "question_id,agent")
    rows = cells(out)
    assert [row[:4] for row in rows] == [
        *(["q0", str(agent), "1" if agent < 7 else "0", "0" if agent % 3 else "1"] for agent in (*range(7), 9)),
        ["all", "", "7", "4"],
    ]


def test_show_prints_a_call_with_its_attempts(capsys, path):
    key = make_turn(agent=3).key
    code, out, _ = run(capsys, "show", path, key[:12])
    assert code == 0
    for wanted in (
        key,
        "temperature 0.8",
        "ids: [4, 5, 6]",
        "failed: slow",
        "so 2",
        "ids: [3, 4, 5, 6]",
        "5 prompt tokens",
    ):
        assert wanted in out
    for wrong, message in (("zz", "hexadecimal"), ("ab" * 12, "no call begins with it"), ("", "hexadecimal")):
        code, _, err = run(capsys, "show", path, wrong)
        assert code == 2
        assert message in err
    with TraceStore(path) as store:
        store.record_many([make_turn(agent=agent) for agent in range(100, 140)])
        first = next(keys for digit in "0123456789abcdef" if len(keys := store.keys(digit)) > 1)
    code, _, err = run(capsys, "show", path, first[0][0])
    assert code == 2
    assert f"{len(first)} begin with it: {first[0]}" in err


def test_show_decodes_the_prompt_with_the_right_tokenizer(capsys, tmp_path):
    train_tokenizer(["Tom has 3 apples."], 280, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("Tom has 3 apples.")
    call = make_call(tokenizer=tokenizer.hash, prompt=(ids,))
    completion = Completion(np.asarray([5], np.int32), np.zeros(1, np.float32), "3", "stop", len(ids), 0, 0.1)
    path = make_store(tmp_path / "traces.sqlite", [Turn(call, 0, completion), make_turn()])
    code, out, _ = run(capsys, "show", path, call.key, "--tokenizer", tmp_path)
    assert code == 0
    assert "Tom has 3 apples." in out
    assert "ids:" not in out
    code, _, err = run(capsys, "show", path, make_turn().key, "--tokenizer", tmp_path)
    assert code == 2
    assert "the call was made with t" in err


def test_show_says_what_was_text_only(capsys, tmp_path):
    turns = [make_turn(), text_only(make_turn(agent=1))]
    path = make_store(tmp_path / "traces.sqlite", turns)
    shown = [run(capsys, "show", path, turn.key)[1] for turn in turns]
    assert ["text only: the ids were encoded from it" in out for out in shown] == [False, True]
    assert run(capsys, "stats", path)[0] == 0


EVIL = "\x1b[2J\x1b]0;title\x07[bold]so\x1b]8;;http://x\x1b\\ 2\x9b31m\x08\r\x00\u202e\ttab\nline\x1b"


def test_what_a_model_said_cannot_command_the_terminal(capsys, tmp_path):
    assert plain(EVIL) == "[bold]so 231m\ttab\nline"
    assert plain("\x1b]0;never ends") == ""
    quick = time.monotonic()
    plain("\x1b]" * 20_000 + "\x1b[" * 20_000)
    assert time.monotonic() - quick < 2
    turns = [make_turn(text=EVIL, role=EVIL), make_turn(agent=1, error=EVIL)]
    path = make_store(tmp_path / "traces.sqlite", turns)
    printed = [run(capsys, "show", path, turn.key) for turn in turns] + [run(capsys, "stats", path)]
    tamper(path, "UPDATE turns SET call_key = ? WHERE error IS NOT NULL", EVIL)
    printed.append(run(capsys, "verify", path))
    for _, out, err in printed:
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out + err)
    assert "[bold]so" in printed[0][1]


def test_exports_and_merges(capsys, tmp_path, path):
    code, out, _ = run(capsys, "export", path, "--canonical", tmp_path / "a.jsonl")
    assert (code, out) == (0, f"{tmp_path / 'a.jsonl'}: 11 turns\n")
    assert (tmp_path / "a.jsonl").read_bytes() == exported(path)
    assert run(capsys, "export", path, "--parquet", tmp_path / "out")[0] == 0
    (tmp_path / "run").mkdir()
    make_store(tmp_path / "run" / "traces.sqlite", [make_turn(agent=50)])
    code, out, _ = run(capsys, "merge", tmp_path / "all.sqlite", tmp_path / "out", tmp_path / "run", path)
    assert code == 0
    assert [line.split(": ")[1] for line in out.splitlines()] == [
        *("11 turns added", "1 turns added", "0 turns added", "12 turns")
    ]
    for options in ([], ["--canonical", "x", "--parquet", "y"]):
        assert run(capsys, "export", path, *options)[0] == 2


def test_verify_ends_with_1_and_names_what_is_wrong(capsys, path):
    assert run(capsys, "verify", path)[:2] == (0, f"{path}: 11 turns, 0 problems\n")
    tamper(path, "UPDATE turns SET text = 'so 3' WHERE agent = 2")
    code, out, _ = run(capsys, "verify", path)
    assert code == 1
    assert out.splitlines() == [
        f"turn {make_turn(agent=2).key}, attempt 1: its answer is not the one that was recorded",
        f"{path}: 11 turns, 1 problems",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["status"], "invalid choice"),
        (["stats"], "STORE"),
        (["stats", "{path}", "--by", "colour"], "'colour' is not a choice of protocol,role"),
        (["stats", "{path}", "--by", "role,role"], "each once"),
        (["stats", "{path}", "--prices", "1,2"], "three numbers"),
        (["stats", "{path}", "--prices", "1,2,-3"], "three numbers"),
        (["stats", "{path}", "--prices", "1,2,nan"], "three numbers"),
        (["merge", "{path}"], "IN"),
    ],
)
def test_arguments_that_cannot_be_used(capsys, path, arguments, message):
    code, _, err = run(capsys, *(argument.format(path=path) for argument in arguments))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["", "stats", "show", "export", "merge", "verify"])
def test_help_teaches_by_example(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main(["traces", *([command] if command else []), "--help"])
    assert ended.value.code == 0
    assert "agentark traces" in capsys.readouterr().out


def test_a_missing_store_is_named(capsys, tmp_path):
    for command in (["stats"], ["verify"], ["export", "--canonical", "x"]):
        code, _, err = run(capsys, *command, tmp_path / "absent.sqlite")
        assert code == 1
        assert f"{tmp_path / 'absent.sqlite'}: there is no trace store" in err


def test_a_bar_shows_the_rate_of_tokens_or_of_what_it_counts():
    clock = iter(range(0, 1000, 2))
    rates = []
    for tokens in (0, 600):
        progress = Progress(_Rate(), get_time=lambda: next(clock))
        bar = Bar(progress, "judge turns", 40)
        bar.set(30, 40, tokens)
        (task,) = progress.tasks
        task.start_time, task.stop_time = 0, 20
        rates.append(_Rate().render(task).plain)
    assert rates == ["1.5/s", "30 tokens/s"]


def test_ids_and_paths_are_printed_as_they_are(capsys, tmp_path):
    place = tmp_path / "[red]:m:"
    place.mkdir()
    path = make_store(place / "traces.sqlite", EVERY, LABELS)
    with TraceStore(path) as store:
        store.put_labels(Label(turn.key, "judge:m:1", "right", "7") for turn in store.turns(errors=False))
    for command in (("stats", path), ("select", path, "--grader", "judge:m:1", "--out", tmp_path / "out")):
        code, out, _ = run(capsys, *command)
        assert code == 0
        assert str(path) in out
    assert "judge:m:1" in out
