"""The recipes of GSM8K and MedMCQA from local files to the table, at a small size, on a model of Qwen3's format.

MedMCQA's debate is the model's own. No model so small solves GSM8K, so there a stand-in teaches: a server that says the
dataset's own solutions, with mistakes. It proves that the stages go together, and nothing about any model.
"""

import json
import random
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from chat_families import write_family
from test_datasets import DATA, real
from test_run import ROOT, complete

from agentark_jax.arms import label_of
from agentark_jax.config import parse
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.models import transformer, weights
from agentark_jax.models.config import load_config
from agentark_jax.models.source import ScratchConfig
from agentark_jax.records import Question
from agentark_jax.tasks.overlap import overlaps
from agentark_jax.tasks.rows import read_file
from agentark_jax.tasks.task import make_task
from agentark_jax.traces.selection import load_selection
from agentark_jax.traces.store import TraceStore

pytestmark = pytest.mark.slow

SIZES = {"gsm8k": (40, 40, 12), "medmcqa": (120, 80, 24)}  # of warm_start, debate, held_out
# What teaches a model so small most in the least time: many steps of one row; no row is longer than it must be.
TRAINING = {"learning_rate": 5e-3, "rows": 1, "compute_dtype": "float32", "remat": "products"}
LENGTHS = {"gsm8k": (240, 1664), "medmcqa": (12, 640)}  # of an answer, and of a row, in tokens
EPOCHS = {"gsm8k": 2, "medmcqa": 12}  # of the first phase of the warm start


def recipe(name: str) -> Path:
    return ROOT / "configs" / f"{name}.yaml"


def smaller(name: str, model: Path) -> list[str]:
    """What is given with a recipe: local files, the model, and fewer of everything."""
    max_tokens, row_length = LENGTHS[name]
    given = {"task.path": DATA, "model.source": model, "debate.max_tokens": max_tokens}
    given |= {f"questions.{split}": size for split, size in sizes(name).items()}
    given |= {
        "engine.slots": 24,
        "evaluate.vote_samples": 3,
        "evaluate.multi_call_questions": 8,
        "warm_start.answer.epochs": EPOCHS[name],
    }
    for fit in ("warm_start.answer", "warm_start.revision", "fit"):
        given |= {f"{fit}.{key}": value for key, value in {**TRAINING, "row_length": row_length}.items()}
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


def sizes(name: str) -> dict[str, int]:
    return dict(zip(("warm_start", "debate", "held_out"), SIZES[name], strict=True))


def make_model(directory: Path, questions: list[Question]) -> Path:
    """Tiny random weights under a tokenizer, a chat template and end tokens like Qwen3's."""
    write_family("qwen3", directory, [text for each in questions for text in (each.prompt, each.rationale)], 1024)
    tokenizer = Tokenizer(directory)
    shape = ScratchConfig(
        hidden_size=48, layers=2, heads=2, kv_heads=1, head_dim=24, intermediate_size=96, max_positions=2048
    )
    raw = shape.to_hf(vocabulary=tokenizer.vocabulary_size, bos_id=None, eos_id=tokenizer.eos_id)
    (directory / "config.json").write_text(json.dumps(raw))
    config = load_config(directory)
    return weights.save_pretrained(directory, config, transformer.init_params(config, 0), directory)


@contextmanager
def teacher(model: Path, questions: list[Question]):
    """The URL of an OpenAI-compatible server that answers six prompts of ten with the solution to their question.

    Else the result is off by one. What it says follows from the seed it is sent.
    """
    tokenizer = Tokenizer(model)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"object": "list", "data": [{"id": "teacher", "object": "model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = say(body["prompt"], body.get("seed", 0))
            usage = {
                "prompt_tokens": len(tokenizer.encode(body["prompt"])),
                "completion_tokens": min(len(tokenizer.encode(said)), body["max_tokens"]),
            }
            self.answer({"choices": [{"index": 0, "text": said, "finish_reason": "stop"}], "usage": usage})

        def answer(self, content):
            sent = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_):
            pass

    def say(prompt: str, seed: int) -> str:
        found = [question for question in questions if question.prompt in prompt]
        if not found:
            return "Who asks?"
        draws = random.Random(seed)
        solution = draws.choice(["", "Let us see.\n", "One step after the other.\n"]) + found[0].rationale
        if draws.random() < 0.6:
            return solution
        way, _ = solution.rsplit("The answer is", 1)
        return f"{way}The answer is {int(found[0].answer.replace(',', '')) + 1}."

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module", params=["gsm8k", "medmcqa"])
def finished(request, tmp_path_factory) -> tuple[str, Path, list[str]]:
    """A recipe's name, its run, and what it was given."""
    name, root = request.param, tmp_path_factory.mktemp("runs")
    real(f"{name}/{'test' if name == 'gsm8k' else 'dev'}.jsonl")
    task = make_task(parse(["--config", str(recipe(name)), "--task.path", str(DATA)], "", "")[0].task, sizes(name))
    questions = [question for split, size in sizes(name).items() for question in task.questions(split, size)]
    model = make_model(root / "model", questions)
    given = smaller(name, model)
    if name == "medmcqa":
        complete(root, *given, config=recipe(name))
        return name, root / name, given
    with teacher(model, questions) as url:
        taught = {"model": str(model), "api": "openai", "servers": [url]}
        given += ["--team", json.dumps([{"model": None}, taught, taught])]
        complete(root, *given, config=recipe(name))
    return name, root / name, given


def manifest(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "manifest.json").read_text())


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def arms_of(name: str) -> list[str]:
    return parse(["--config", str(recipe(name))], "", "")[0].arms


def test_all_strategies_are_in_one_table(finished):
    name, run, _ = finished
    arms, page = results(run)["arms"], (run / "report.html").read_text()
    assert list(arms) == ["base", "vote", "debate", "student", *arms_of(name)]
    table = page.split('<section id="arms">')[1].split("</section>")[0]
    for arm, figures in arms.items():
        assert figures["n"] == (8 if arm in ("vote", "debate") else SIZES[name][2])
        assert f'<th class="name" scope="row">{figures["label"]}<' in table
    compared = {frozenset((each["a"], each["b"])) for each in results(run)["differences"]}
    assert {frozenset((one, "base")) for one in ("student", *arms_of(name))} <= compared
    assert {frozenset(("student", other)) for other in arms_of(name)} <= compared
    assert [arms[arm]["label"] for arm in arms_of(name)] == [label_of(arm) for arm in arms_of(name)]


def test_the_control_has_the_students_questions_and_tokens(finished):
    _, run, _ = finished
    student, control = (load_selection(run / "select" / f"{arm}.parquet") for arm in ("student", "control"))
    assert [t.question_id for t in control.trajectories] == [t.question_id for t in student.trajectories]
    assert abs(control.tokens - student.tokens) <= 0.01 * min(control.tokens, student.tokens)
    assert {t.round for t in student.trajectories} == {1}
    assert {t.round for t in control.trajectories} == {0}
    for arm, selection in (("student", student), ("control", control)):
        assert manifest(run, arm)["counts"]["loss_tokens"] == selection.tokens


def test_every_student_is_trained_on_both_terms(finished):
    name, run, _ = finished
    steps = manifest(run, "student")["counts"]["steps"]
    for arm in ("student", *arms_of(name)):
        fitted = manifest(run, arm)
        assert fitted["config"]["fit"]["coefficients"] == {"reasoning": 1.0, "answer": 1.0}
        assert abs(fitted["counts"]["steps"] - steps) <= (arm == "control")
        measured = [json.loads(line) for line in (run / arm / "metrics.jsonl").read_text().splitlines()]
        for line in measured:
            assert line["loss"] == pytest.approx(line["nll/reasoning"] + line["nll/answer"], rel=1e-5)
            assert line["nll/answer"] > 0
            reasons = name == "gsm8k" and arm != "answer_only"  # MedMCQA's local files have no explanations
            assert (line["nll/reasoning"] > 0) == reasons
    assert manifest(run, "diverse_k2")["config"]["weighting"] == "questions"
    assert manifest(run, "diverse_k2_after_student")["inputs"]["base"] == manifest(run, "student")["fingerprint"]


def test_no_held_out_question_is_learned_from(finished):
    name, run, _ = finished
    lines = (run / "questions" / "questions.jsonl").read_text().removesuffix("\n").split("\n")
    questions = [Question(**json.loads(line)) for line in lines]
    held_out = [question for question in questions if question.split == "held_out"]
    learned = [question for question in questions if question.split != "held_out"]
    assert (len(learned), len(held_out)) == (sum(SIZES[name][:2]), SIZES[name][2])
    assert not list(overlaps(learned, held_out))
    if name == "gsm8k":
        asked = {split: asked_in(split) for split in ("train.jsonl.gz", "test.jsonl")}
        assert all(question.prompt.rsplit("\n", 1)[0] in asked["test.jsonl"] for question in held_out)
        assert all(question.prompt.rsplit("\n", 1)[0] in asked["train.jsonl.gz"] for question in learned)
    by_id = {question.id: question.split for question in questions}
    for arm in ("student", "control", "diverse_k2"):
        trajectories = load_selection(run / "select" / f"{arm}.parquet").trajectories
        assert {by_id[trajectory.question_id] for trajectory in trajectories} == {"debate"}


def asked_in(file: str) -> set[str]:
    return {row.values["question"].strip() for row in read_file(real(f"gsm8k/{file}"))}


def test_who_debated_is_whom_the_recipe_was_given(finished):
    name, run, _ = finished
    keys = json.loads((run / "debate" / "keys.json").read_text())
    with TraceStore(run / "traces.sqlite", read_only=True) as store:
        turns = list(store.turns(keys=keys))
        assert store.verify() == []
    assert len(turns) == SIZES[name][1] * 3 * 2
    base = manifest(run, "base")["counts"]["revision"]
    teachers = {(0, base, False), (1, "openai:teacher", True), (2, "openai:teacher", True)}
    themselves = {(agent, base, False) for agent in range(3)}
    found = {(turn.call.agent, turn.call.weights, turn.completion.text_only) for turn in turns}
    assert found == (teachers if name == "gsm8k" else themselves)
    right = manifest(run, "debate")["counts"]["verdicts"]
    assert right["right"] > 0
    assert right["wrong"] > 0


def test_a_second_start_does_nothing(finished):
    """The teacher is gone by then."""
    name, run, given = finished
    assert "Everything was up to date" in complete(run.parent, *given, config=recipe(name))
