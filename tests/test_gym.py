"""Questions of reasoning-gym: apart in every split, the same in every process, judged without running an answer."""

import builtins
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest

from agentark_jax.errors import UsageError
from agentark_jax.records import Question
from agentark_jax.tasks import gym
from agentark_jax.tasks.config import GymConfig, HubConfig, TaskConfig
from agentark_jax.tasks.grading.final_answer import normalised
from agentark_jax.tasks.gym import GENERATORS, SCORED
from agentark_jax.tasks.overlap import overlaps
from agentark_jax.tasks.task import SPLITS, Task, make_task

needs_library = pytest.mark.skipif(
    find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed (extra `gym`)"
)
README = Path(__file__).parents[1] / "README.md"
SIZES = {"warm_start": 12, "debate": 16, "held_out": 12, "validation": 2}
SLOW = {"zebra_puzzles": {"warm_start": 2, "debate": 4, "held_out": 2}}
SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
HOSTILE = (
    "__import__('os').system('touch hostile')", "[].__class__.__base__.__subclasses__()", "9**9**9**9", "(" * 190,
    "[" * 190, "1e999", "NaN", "٣", "²", "1/0", "\x00", "True", "0", "None", "- - -", ",,,", "right", "* #", "{}" * 90,
)  # fmt: skip


def task_of(generator: str, seed: int = 0, sizes: dict[str, int] | None = None, **parameters: object) -> Task:
    config = TaskConfig(gym=GymConfig(generator, parameters), seed=seed)
    return make_task(config, sizes or SLOW.get(generator, SIZES))


def all_of(task: Task, sizes: dict[str, int]) -> list[Question]:
    return [question for split, size in sizes.items() for question in task.questions(split, size)]


@needs_library
@pytest.mark.parametrize("generator", GENERATORS)
def test_every_generator(generator, monkeypatch):
    """Splits are apart; golds are right and nothing else is; nobody evaluates an answer."""
    task, sizes = task_of(generator), SLOW.get(generator, SIZES)
    found = all_of(task, sizes)
    assert len({normalised(question.prompt) for question in found}) == len(found) == sum(sizes.values())
    assert all(question.rationale == f"The answer is {question.answer.removesuffix('.')}." for question in found)
    assert json.loads(json.dumps([dict(question.meta) for question in found], allow_nan=False))
    for source, other in zip(found, found[1:] + found[:1], strict=True):
        # As it comes back from the store.
        question = replace(source, meta=json.loads(json.dumps(dict(source.meta))))
        assert task.grade(question, f"Let me see.\n{question.rationale}").verdict == "right"
        if GENERATORS[generator] != SCORED and normalised(other.answer) != normalised(question.answer):
            assert task.grade(question, other.rationale).verdict != "right"
        assert task.grade(question, f"The answer is not {question.answer}").verdict != "right"

    ran: list[object] = []
    question = next(question for question in found if question.answer not in HOSTILE)
    for name in ("eval", "exec", "compile"):
        monkeypatch.setattr(builtins, name, lambda *given: ran.append(given))
    verdicts = [task.grade(question, f"The answer is {text}").verdict for text in HOSTILE]
    monkeypatch.undo()
    assert "right" not in verdicts
    assert ran == []


@needs_library
def test_a_generator_draws_alike_in_every_process():
    """Python's hash seed, which the order of sets follows, is another in each."""
    program = (
        "import json; from agentark_jax.tasks.config import GymConfig, TaskConfig\n"
        "from agentark_jax.tasks.gym import GENERATORS; from agentark_jax.tasks.task import make_task\n"
        "for name in GENERATORS:\n"
        "    task = make_task(TaskConfig(gym=GymConfig(name), seed=7), {'debate': 6})\n"
        "    found = task.questions('debate', 6)\n"
        "    print(json.dumps([name, [[q.prompt, q.answer, q.meta] for q in found]]))\n"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for seed in ("1", "2")
    ]
    assert [json.loads(line)[0] for line in said[0]] == list(GENERATORS)
    assert [json.loads(one)[0] for one, other in zip(*said, strict=True) if one != other] == []


@needs_library
def test_a_larger_count_only_appends_and_changes_no_other_split():
    few, many = task_of("chain_sum"), task_of("chain_sum", sizes={**SIZES, "debate": 60, "held_out": 1})
    assert many.questions("debate", 60)[:16] == few.questions("debate", 16)
    assert many.questions("warm_start", 12) == few.questions("warm_start", 12)
    assert many.questions("held_out", 1) == few.questions("held_out", 1)


@needs_library
def test_task_seeds_share_no_draws():
    sizes = dict.fromkeys(SPLITS, 20)
    tasks = [task_of("products", seed, sizes, min_digits=9, max_digits=9) for seed in (0, 1, 2, 3, 2**63 - 1)]
    assert len({question.prompt for task in tasks for question in all_of(task, sizes)}) == 5 * 80


@needs_library
def test_no_seed_learns_what_another_holds_out():
    """Also with so few questions that all seeds draw the same ones."""
    sizes = {"warm_start": 8, "debate": 16, "held_out": 8}
    tasks = [task_of("chain_sum", seed, sizes, **SMALL) for seed in range(8)]
    held_out = {normalised(question.prompt) for task in tasks for question in task.questions("held_out", 8)}
    learned = {
        normalised(question.prompt)
        for task, split in product(tasks, ("warm_start", "debate"))
        for question in task.questions(split, sizes[split])
    }
    assert len(held_out) < 8 * 8  # they do draw the same ones
    assert not held_out & learned
    assert tasks[0].counts["duplicates_dropped"] > 0


@needs_library
def test_parameters_count_and_too_small_a_generator_is_refused():
    ((question,),) = [task_of("chain_sum", sizes={"debate": 1}, min_terms=9, max_terms=9).questions("debate", 1)]
    assert question.prompt.count(" + ") + question.prompt.count(" - ") == 8
    assert question.task == "reasoning_gym/chain_sum"
    with pytest.raises(UsageError, match=r"2000 draws of chain_sum in a row .*debate has \d+ of 200\)\. Lower"):
        task_of("chain_sum", sizes={"debate": 200, "held_out": 8}, **SMALL)


@needs_library
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"terms": 3}, r"does not work with \{'terms': 3\} .*min_terms: 2, max_terms: 6"),
        ({"min_terms": 0}, r"does not work .*min_terms must be positive"),
        ({"min_terms": "many"}, "does not work .*TypeError"),
        ({"seed": 3}, "does not work .*seed"),
    ],
)
def test_parameters_that_it_does_not_take(parameters, message):
    with pytest.raises(UsageError, match=r"task\.gym\.parameters: chain_sum " + message):
        make_task(TaskConfig(gym=GymConfig("chain_sum", parameters)), SIZES)


@needs_library
def test_all_palindromes_are_right():
    task = task_of("palindrome_generation", sizes={"debate": 30})
    assert task.grader_id == "reasoning-gym-0.1.25-palindrome_generation"
    several = 0
    for question in task.questions("debate", 30):
        half = question.answer[: len(question.answer) // 2]
        turned = half[::-1] + question.answer[len(half) : len(question.answer) - len(half)] + half
        several += turned != question.answer
        assert task.grade(question, f"The answer is {turned.upper()}.").verdict == "right"
        assert task.grade(question, f"The answer is {turned + turned}.").verdict == "wrong"
        assert task.grade(question, f"The answer is {turned}, or {question.answer}.").verdict == "wrong"
        assert task.grade(question, turned).verdict == "unparseable"
    assert several > 5


@needs_library
def test_all_shortest_paths_are_right_and_longer_ones_wrong():
    task = task_of("shortest_path", sizes={"debate": 60}, max_rows=5, max_cols=5, p_blocked=0.1)
    steps = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}
    others = detours = 0
    for question in task.questions("debate", 60):
        gold, grid = question.answer.split(), question.meta["metadata"]["matrix"]
        if gold == ["infeasible"] or not 1 <= len(gold) <= 4:
            continue
        start = next((row, column) for row in range(5) for column in range(5) if grid[row][column] == "*")
        for length in (len(gold), len(gold) + 2):
            for path in product(steps, repeat=length):
                cells = [start]
                for step in path:
                    cells.append(tuple(a + b for a, b in zip(cells[-1], steps[step], strict=True)))
                inside = all(0 <= row < 5 and 0 <= column < 5 and grid[row][column] != "X" for row, column in cells)
                arrives = inside and grid[cells[-1][0]][cells[-1][1]] == "#"
                right = arrives and length == len(gold)
                others += right and list(path) != gold
                detours += arrives and not right
                verdict = task.grade(question, f"The answer is {' '.join(path)}.").verdict
                assert verdict == ("right" if right else "wrong")
    assert others > 0
    assert detours > 0


@needs_library
def test_a_generators_questions_are_not_taken_for_each_other():
    """They share most of their words, and some differ in a sign alone."""
    for generator in ("string_insertion", "number_sequence"):
        task = task_of(generator)
        assert list(overlaps(task.questions("debate", 16), task.questions("held_out", 12))) == []


def test_readme_lists_them():
    rows = [line for line in README.read_text().splitlines() if line.startswith("| ") and "`, `" in line]
    for judge in {*GENERATORS.values()}:
        listed = {name for name, by in GENERATORS.items() if by == judge}
        assert any({*re.findall("`([a-z_0-9]+)`", row.split(" | ")[-1])} == listed for row in rows), judge


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gym, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"reasoning-gym; pip install 'agentark-jax\[gym\]'"):
        task_of("chain_sum")


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        ("chain_summ", r"task\.gym\.generator is 'chain_summ'; use perhaps: chain_sum"),
        ("n_queens", r"task\.gym\.generator is 'n_queens'; use one of: ab, aiw, .*not judged strictly enough"),
        ("word_ladder", "'word_ladder'"),
    ],
)
def test_other_generators_are_refused(generator, message):
    with pytest.raises(UsageError, match=message):
        task_of(generator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hub": HubConfig("x")}, r"task\.gym and task\.hub are both set"),
        ({"path": "x"}, r"task\.gym and task\.path are both set"),
        ({"name": "gsm8k"}, r"task\.gym and task\.name are both set"),
        ({"shots": 2}, r"task\.shots is for questions that are read"),
        ({"grader": "short"}, r"task\.grader is for your own"),
        ({"held_out": "svamp"}, r"task\.held_out goes with questions that are read"),
    ],
)
def test_settings_that_do_not_go_with_it(options, message):
    with pytest.raises(UsageError, match=message):
        TaskConfig(gym=GymConfig("chain_sum"), **options)
    assert TaskConfig(gym=GymConfig("chain_sum")).title == "chain_sum of reasoning-gym"
