"""A results.json with every part in it and debates to go with it, made up; hostile and realistically long ones too."""

import random

from agentark_jax.report import words

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" 'single' & $\\frac{1}{0}$ {{ 7 * 7 }} "
    "[red]markup[/red] <!-- http://example.com/x.png ]]> \x00\x1b[31m \u2028 \ud800 字"
)


def arm(label: str, correct: int, n: int, tokens: float, protocol: str = "single", model: str = "base") -> dict:
    low, high = words.wilson(correct, n)
    return {
        "label": label, "description": f"what {label} is", "protocol": protocol, "model": model,
        "accuracy": correct / n, "low": low, "high": high, "correct": correct, "n": n,
        "questions": "all" if n == 96 else "subset", "unparseable": 2, "calls_per_question": 1.0,
        "tokens_per_question": {"prompt": tokens / 2, "completion": tokens / 2, "total": tokens},
        "cost_ratio": tokens / 91,
    }  # fmt: skip


def difference(
    a: str, b: str, value: float, low: float, high: float, p_value: float = 0.01, p_holm: float = 0.02
) -> dict:
    return {
        "name": f"{a}_{b}", "a": a, "b": b, "difference": value, "low": low, "high": high, "n": 96, "p_value": p_value,
        "p_holm": p_holm, "level": 0.95,
        "minimum_detectable": 0.105, "sentence": f"{a} against {b} in a sentence.", "seed_low": None, "seed_high": None,
    }  # fmt: skip


def full_results() -> dict:
    flips = {"right→right": 46, "wrong→right": 17, "right→wrong": 9, "wrong→wrong": 72}
    history = [[step, 1.0 / step] for step in range(1, 1001)]
    return {
        "schema": 1,
        "run": {
            "name": "quickstart", "seeds": [0], "git": None, "fingerprint": "6f1d", "versions": {"jax": "0.10.2"},
            "command": "python -m agentark_jax.train --config configs/quickstart.yaml",
            "config": {"model": {"source": "somewhere"}, "arms": ["single"]},
        },
        "model": {"source": "somewhere", "name": "Gemma 3 270M", "parameters": 268098176, "trainable": 100326016},
        "task": {"name": "chains", "path": None, "questions": {"warm_start": 150, "debate": 48, "held_out": 96}},
        "arms": {
            "base": arm("Base model", 41, 96, 91.2),
            "student": arm("Debate student", 49, 96, 92.3, model="student"),
            "single": arm("Single-agent student at equal tokens", 46, 96, 90.4, model="single"),
            "vote": arm("Majority vote of 5", 24, 48, 456, "vote"),
            "debate": arm("Debate, 3 agents × 2 rounds", 23, 48, 962, "debate"),
        },
        "differences": [
            difference("student", "base", 0.083, 0.01, 0.16),
            difference("student", "single", 0.031, -0.042, 0.104, 0.4, 0.4),
            difference("debate", "vote", -0.2, -0.3, -0.1),
        ],
        "counts": {"student": [{"filter": "graded right", "kept": 118, "dropped": 170}]},
        "debate": {
            "agents": 3, "rounds": 2, "turns": 288,
            "accuracy_by_round": [
                {"round": k, "accuracy": 0.4, "low": 0.3, "high": 0.5, "n": 144, "majority": 0.45, "agreement": 0.6}
                for k in (1, 2)
            ],
            "flips": [{"from_round": 1, "to_round": 2, **flips}],
        },
        "training": {
            "student": {
                "examples": 88, "steps": 1000, "tokens": 9000, "loss_tokens": 5000, "final_loss": 0.001,
                "history": history, "validation": history[99::100],
            }
        },
        "curves": {
            "difficulty": {
                "title": "By difficulty", "x": "steps", "y": "accuracy",
                "series": [
                    {"name": "base", "points": [{"x": x, "y": 0.5 / x, "low": 0.4 / x, "high": 0.6 / x, "n": 32}
                                                for x in (1, 2, 3)]}
                ],
            },
            "kinds": {
                "title": "By kind", "x": "kind", "y": "loss",
                "series": [{"name": "base", "points": [{"x": "sum", "y": 1.5, "low": 1.0, "high": 2.0, "n": 9}]}],
            },
        },
        "per_seed": [],
        "attribution": attribution(),
        "checks": checks(),
        "timing": {
            "total_seconds": 742.3,
            "stages": [
                {"stage": "model", "seconds": 8.0, "tokens": 0, "tokens_per_second": None, "reused": True},
                {"stage": "debate", "seconds": 100.0, "tokens": 41000, "tokens_per_second": 410.0, "reused": False},
            ],
        },
    }  # fmt: skip


def attribution() -> dict:
    def row(name: str, label: str, kind: str, matched: bool, **more: object) -> dict:
        return {
            "arm": name, "label": label, "learns": f"what {label} learns", "kind": kind, "matched": matched,
            "trajectories": 88, "rollouts": None, "loss_tokens": 5000, "steps": 1000, "accuracy": 0.5, "low": 0.4,
            "high": 0.6, "n": 96, "difference": 0.083, "difference_low": 0.01, "difference_high": 0.16,
        } | more  # fmt: skip

    nothing = dict.fromkeys(("trajectories", "loss_tokens", "steps", "difference"))
    pays = {
        "arm": "student", "against": "debate", "distillation": 1_200_000.0, "per_question": 92.3,
        "against_per_question": 962.0, "saved_per_question": 869.7, "queries": 1379.8, "queries_low": 1200.0,
        "queries_high": None, "difference": 0.02, "low": -0.05, "high": 0.09, "n": 48, "sentence": "It pays.",
    }  # fmt: skip
    asked = [
        difference("student", "base", 0.083, 0.01, 0.16),
        difference("student", "single", 0.031, -0.042, 0.104, 1, 1),
    ]
    return {
        "arms": [
            row("student", "Debate student", "debate", True),
            row("base", "Base model", "base", False, learns="", **nothing),
            row("vr", "Rewarded student", "rewards", False, trajectories=None, rollouts=20480),
            row("single", "Single-agent student", "no debate", True),
        ],
        "contrasts": [
            item
            | {"asks": "Does debate help?", "matched": item["b"] == "single", "questions": 96, "per_seed": [0.05, 0.1]}
            for item in asked
        ],
        "matching": [
            {
                "questions": 85, "dropped": {"not in all arms": 3}, "tokens": {"student": 5000, "single": 5010},
                "lengths": {"single": {"distance": 0.01, "p": 0.93}},
            }
        ],
        "break_even": [pays, pays | {"against": "vote", "queries": None, "queries_low": None}],
        "conclusion": ["1 of 2 contrasts shows a difference.", "Peers are needed."],
    }  # fmt: skip


def checks() -> list[dict]:
    return [
        {"name": "A/A", "expected": 0.0, "found": {"difference": 0.01, "low": -0.02, "high": 0.04, "n": 96},
         "passed": True, "sentence": "Two students of the same data do not differ."},
        {"name": "planted", "expected": 0.05, "found": {"difference": 0.01, "low": -0.02, "high": 0.03, "n": 96},
         "passed": False, "sentence": "The planted effect was missed."},
    ]  # fmt: skip


def transcript(index: int, agents: int = 3, rounds: int = 2, text: str = "3 + 4 = 7. The answer is 7.") -> dict:
    return {
        "id": f"{index:024x}", "question": f"Question {index}?", "gold": "7", "rationale": "3 + 4 = 7.", "steps": 1,
        "final_answer": "7", "final_verdict": "right",
        "rounds": [
            [
                {"agent": agent, "text": text, "answer": "7", "verdict": "right", "tokens": 12,
                 "flip": "wrong→right" if turn else None}
                for agent in range(1, agents + 1)
            ]
            for turn in range(rounds)
        ],
        "answers": {"base": {"text": text, "answer": "7", "verdict": "right"}},
    }  # fmt: skip


def poisoned(value: object) -> object:
    """`value` with every free text in it made hostile; the words of the schema stay."""
    if isinstance(value, dict):
        kept = ("protocol", "model", "questions", "verdict", "final_verdict", "flip", "a", "b", "against")
        return {key: item if key in kept and isinstance(item, str) else poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


STARTS = ("First", "Then", "Now", "After that", "So", "In the end", "Thus", "Next")
THINGS = (
    "the baker",
    "Amy",
    "the price",
    "each box",
    "the train",
    "Finn",
    "the total",
    "a week",
    "the farm",
    "her bag",
)
VERBS = ("takes", "adds up", "comes to", "holds", "is the sum of", "sells", "needs", "costs", "counts")


def realistic(index: int, agents: int = 3, rounds: int = 2, tokens: int = 150) -> dict:
    """A transcript of GSM8K-like length in which no two answers are alike, some agents flip and arms answer too."""
    draw = random.Random(index)

    def said() -> str:
        count = tokens // 15
        numbers = iter(draw.choices(range(10, 999), k=3 * count))
        parts = (draw.choices(options, k=count) for options in (STARTS, THINGS, VERBS))
        return " ".join(
            f"{start} {thing} {verb} {next(numbers)} and {next(numbers)}, which makes {next(numbers)}."
            for start, thing, verb in zip(*parts, strict=True)
        )

    item = transcript(index, agents, rounds)
    item |= {
        "question": f"Question {index}: {said()}",
        "rationale": said(),
        "split": "held_out" if index % 3 else "debate",
    }
    for each, turns in enumerate(item["rounds"]):
        for turn in turns:
            right = draw.random() < 0.5
            turn |= {"text": said(), "answer": str(draw.randrange(99)), "verdict": "right" if right else "wrong"}
            before = each and item["rounds"][each - 1][turn["agent"] - 1]["verdict"]
            turn["flip"] = f"{before}→{turn['verdict']}" if before else None
    item["final_verdict"] = draw.choice(("right", "wrong"))
    item["answers"] = {
        name: {"text": said(), "answer": "7", "verdict": draw.choice(("right", "wrong"))}
        for name in ("base", "student")
    }
    return item
