"""Questions of a generator of the library reasoning-gym (extra `gym`).

The library draws item i of a data set with seed s from s + i, so that neighbouring seeds share items. Here every task
seed has a stretch of `STRIDE` of the library's seeds, and all splits are filled from the one stream of its draws: the
hash of a question says to which split it belongs, as with datasets. So no split holds a question of another, whatever
the seed, and a larger count only appends.

Only generators are taken whose answers can be judged strictly and without running them. The library's own scores do
not always do that: some evaluate the answer as Python or sympy code (n_queens, spiral_matrix, countdown), others call
wrong answers right (game_of_life_halting any, number_sorting one that is off by 1). They count only where a question
has several right answers and the check is exact; elsewhere our own graders judge.
"""

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import count
from typing import Any

from agentark_jax.errors import UsageError
from agentark_jax.records import Grade, Question
from agentark_jax.tasks.config import GymConfig, TaskConfig
from agentark_jax.tasks.drawn import DrawnTask, pool_of
from agentark_jax.tasks.grading import Grader, grader
from agentark_jax.tasks.grading.final_answer import normalised
from agentark_jax.tasks.grading.reading import ANSWER_PHRASE, HEADED, Unreadable
from agentark_jax.tasks.items import Item, answered, make_question
from agentark_jax.tasks.overlap import GENERATOR
from agentark_jax.tasks.task import SPLITS

SCORED = "score_answer"
_JUDGED = {
    # What is no number has one right answer, which this grader compares as text.
    "numeric": """
        ab aiw base_conversion basic_arithmetic binary_alternation caesar_cipher chain_sum circuit_logic count_bits
        count_primes decimal_chain_sum gcd gsm_symbolic knights_knaves largest_island lcm leg_counting letter_counting
        maze mini_sudoku number_sequence path_star products rectangle_count rotten_oranges self_reference
        simple_equations simple_geometry spell_backward spiral_matrix string_insertion string_manipulation
        string_splitting string_synthesis word_sequence_reversal word_sorting
    """,
    "short": """
        acre color_cube_rotation course_schedule family_relationships game_of_life_halting mahjong_puzzle
        needle_haystack syllogism zebra_puzzles
    """,
    SCORED: "palindrome_generation shortest_path",
}
# Left out besides: isomorphic_strings, ransom_note and word_ladder, which draw otherwise in every Python process.
GENERATORS = {generator: judge for judge, generators in _JUDGED.items() for generator in generators.split()}
STRIDE = 2**32
# Seeds of as many 32-bit words each, as Python's generator repeats the words of a short one: 2 draws as 2**32 + 2 does.
FIRST = 2**63
BLOCK = 1000  # draws from one of the library's data sets
PATIENCE = 2000  # so many draws in a row without a question that is still needed mean that there is none


class Scored:
    """The library's score of the final answer: right where it is 1. `question.meta["metadata"]` is what it needs."""

    instruction = f'End with "{ANSWER_PHRASE} ..." and nothing after it.'

    def __init__(self, generator: str) -> None:
        self.id = f"reasoning-gym-{metadata.version('reasoning_gym')}-{generator}"
        self._score = _library().get_score_answer_fn(generator)

    def __call__(self, question: Question, text: str) -> Grade:
        read = HEADED.read(text)
        if isinstance(read, Unreadable):
            return Grade("unparseable", detail=read.reason)
        score = self._score(read, {"answer": question.answer, "metadata": question.meta["metadata"]})
        return Grade("right" if score == 1 else "wrong", normalised(read))


def gym_task(config: TaskConfig, sizes: Mapping[str, int]) -> DrawnTask:
    """The questions of a generator. It has no ways to its answers: a rationale states the answer and nothing else.

    Raises UsageError where the library is missing, does not take the parameters, or draws too few different questions.
    """
    gym = config.gym
    assert gym is not None, "a generator is named"
    judge, name = _judge(gym.generator), f"reasoning_gym/{gym.generator}"
    found: dict[str, list[Question]] = {split: [] for split in SPLITS}
    needed = {split for split in SPLITS if sizes.get(split)}
    counts = {"read": 0, "duplicates_dropped": 0, "ungradable_dropped": 0}
    seen: set[str] = set()
    draws, idle = _draws(gym, config.seed), 0
    while needed:
        entry = next(draws)
        counts["read"] += 1
        idle += 1
        if idle > PATIENCE:
            short = ", ".join(f"{split} has {len(found[split])} of {sizes[split]}" for split in sorted(needed))
            raise UsageError(
                f"task.gym: {PATIENCE} draws of {gym.generator} in a row brought no question that is still needed "
                f"({short}). Lower these numbers of questions, or set task.gym.parameters so that it has more."
            )
        gold = str(entry["answer"]).strip()
        meta = {GENERATOR: gym.generator, **({"metadata": entry["metadata"]} if isinstance(judge, Scored) else {})}
        item = Item(entry["question"].strip(), gold, answered("", gold), meta=meta)
        if item.key in seen:
            counts["duplicates_dropped"] += 1
            continue
        seen.add(item.key)
        split = pool_of(item, tested=False)
        if split not in needed:
            continue
        question = make_question(name, split, item, instruction=judge.instruction)
        if judge(question, item.rationale).verdict != "right":
            counts["ungradable_dropped"] += 1
            continue
        found[split].append(question)
        idle = 0
        if len(found[split]) == sizes[split]:
            needed.remove(split)
    return DrawnTask(name, found, {name: judge}, counts)


def _judge(generator: str) -> Grader:
    if generator not in GENERATORS:
        near = difflib.get_close_matches(generator, GENERATORS, n=3, cutoff=0.6)
        raise UsageError(
            f"task.gym.generator is {generator!r}; use {'perhaps' if near else 'one of'}: "
            f"{', '.join(near or GENERATORS)}. What else the library has is not judged strictly enough."
        )
    return Scored(generator) if GENERATORS[generator] == SCORED else grader(GENERATORS[generator])


def _draws(gym: GymConfig, seed: int) -> Iterator[Mapping[str, Any]]:
    library = _library()
    try:
        for start in count((FIRST + seed) * STRIDE, BLOCK):
            drawn = library.create_dataset(gym.generator, seed=start, size=BLOCK, **gym.parameters)
            for place in range(BLOCK):
                yield drawn[place]
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        _, kind = library.factory.DATASETS[gym.generator]
        known = ", ".join(f"{key}: {value}" for key, value in vars(kind()).items() if key not in ("seed", "size"))
        raise UsageError(
            f"task.gym.parameters: {gym.generator} does not work with {dict(gym.parameters)} "
            f"({type(error).__name__}: {error}). It takes these, here with their defaults: {known or 'none'}."
        ) from error


def _library() -> Any:
    if find_spec("reasoning_gym") is None:
        raise UsageError("task.gym needs the Python package reasoning-gym; pip install 'agentark-jax[gym]'")
    return import_module("reasoning_gym")
