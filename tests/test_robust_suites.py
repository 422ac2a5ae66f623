"""Suites of `agentark evaluate`, asked of engines that answer from a script: which questions reach which figures."""

import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import real_server
from rich.console import Console
from scripted import Killed, ScriptedEngine, ScriptedGeneration
from test_datasets import DATA

from agentark_jax import config
from agentark_jax.data.chat import make_format
from agentark_jax.data.config import PromptConfig
from agentark_jax.errors import UsageError
from agentark_jax.evaluation.rubric import AXES
from agentark_jax.evaluation.suite_config import (
    ElsewhereConfig,
    GeneralisationConfig,
    JudgeConfig,
    QualityConfig,
    RetentionConfig,
    RobustnessConfig,
    TruthfulQAConfig,
)
from agentark_jax.generation import Model, Seat
from agentark_jax.progress import Display
from agentark_jax.stages import Run
from agentark_jax.suites import generalisation, quality, retention, robustness, truthfulqa
from agentark_jax.suites.bench import Bench
from agentark_jax.tasks.config import FieldsConfig, TaskConfig
from agentark_jax.tasks.datasets import DATASETS, load
from agentark_jax.tasks.grading import grader
from agentark_jax.tasks.items import Item, make_question
from agentark_jax.tasks.task import make_task
from agentark_jax.traces.store import TraceStore

ROOT = Path(__file__).parent.parent


class ScoringEngine(ScriptedEngine):
    """Also tells log-probabilities: `likely` says of each token's text what they are."""

    likely = staticmethod(lambda text: -1.0)

    async def score(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray([self.likely(self.form.tokenizer.decode([int(token)])) for token in ids[1:]])


@pytest.fixture
def bench(form, tmp_path):
    """A function that makes a bench: of a task, how many of its questions, and a script. Its last one is closed."""
    stores = []

    def make(script, task=None, questions=8, positions=4096, asked_in=form, **engine):
        task = task or TaskConfig()
        while stores:
            stores.pop().close()
        settings = config.EvaluateRun(model="m", task=task, questions=questions, max_tokens=64)
        source = make_task(task, {"held_out": questions})
        asked = source.questions("held_out", questions)
        store, display = TraceStore(tmp_path / "traces.sqlite"), Display(Console(file=StringIO()))
        stores.append(store)
        store.put_questions(asked)
        model = Model("m", tmp_path, "r", SimpleNamespace(max_positions=positions, vocab_size=400), asked_in)
        scripted = ScoringEngine(asked_in, script, **engine)
        generation = ScriptedGeneration(scripted, settings.engine, store, display, seed=0)
        return Bench(settings, Run(tmp_path / "run"), store, display, generation, source, asked, model, Seat(model, ()))

    yield make
    for store in stores:
        store.close()


def write(path: Path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def shown(tables) -> str:
    console = Console(width=200, record=True, file=StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def own(tmp_path: Path, rows, **fields) -> TaskConfig:
    return TaskConfig(path=write(tmp_path / "own.jsonl", rows), fields=FieldsConfig(**fields))


def test_distractors_are_asked_beside_the_questions(bench, tmp_path):
    rows = [
        {"question": f"{name} has {n} {thing}. {other} came by. How many are there?", "answer": n}
        for n, (name, thing, other) in enumerate(
            [("Ann", "green hats", "Bob"), ("Cleo", "brown pigs", "Dan"), ("Eve", "white cups", "Fay")], 3
        )
    ]

    def script(prompt: str, sampling) -> str:
        # Who is not distracted counts what stands in the one sentence with a number.
        numbers = re.findall(r"has (\d)", prompt)
        return f"The answer is {numbers[-1]}."

    made = bench(script, own(tmp_path, rows), questions=3)
    figures = robustness.measure(made, RobustnessConfig(orders=0))
    found = figures["distractors"]
    assert (found["clean"]["value"], found["distracted"]["value"]) == (1, 0)
    assert found["difference"]["value"] == -1
    assert (found["clean"]["n"], found["left_out"]) == (3, 0)
    assert len(made.generation.scripted.prompts) == 6
    assert "orders" not in figures
    again = robustness.measure(made, RobustnessConfig(orders=0))
    assert again == figures
    assert len(made.generation.scripted.prompts) == 6
    assert "100.0" in shown(robustness.tables(figures))


def test_choices_are_asked_in_several_orders(bench, tmp_path):
    rows = [
        {"question": f"Which one is it, number {n}?", "options": [f"{word} {n}" for word in "wxyz"], "answer": n % 4}
        for n in range(8)
    ]
    rows.append({"question": "And which?", "options": ["one", "two", "three", "both A and B"], "answer": 0})
    task = own(tmp_path, rows, choices=("options",))
    first = bench(lambda prompt, sampling: "The answer is (A).", task, questions=9)
    found = robustness.measure(first, RobustnessConfig(distractors=False))["orders"]
    # Of 32 orders two are the questions' own: those count for positions alone.
    assert (found["shuffled"]["value"], found["shuffled"]["n"], found["left_out"]) == (7 / 30, 30, 1)
    assert found["bias"]["value"] == pytest.approx(0.75)
    assert (found["same"]["value"], found["same"]["n"]) == (6 / 30, 30)
    assert [each["accuracy"]["value"] for each in found["positions"]] == [1, 0, 0, 0]


def test_who_reads_the_choices_says_the_same_in_all_orders(bench, tmp_path):
    rows = [
        {"question": f"Which one is it, number {n}?", "options": [f"{word} {n}" for word in "wxyz"], "answer": 2}
        for n in range(8)
    ]

    def script(prompt: str, sampling) -> str:
        return f"The answer is ({re.search(r'([A-D])[)] y', prompt)[1]})."

    made = bench(script, own(tmp_path, rows, choices=("options",)))
    figures = robustness.measure(made, RobustnessConfig(distractors=False, orders=2))
    assert figures["orders"]["shuffled"]["value"] == figures["orders"]["always"]["value"] == 1
    assert figures["orders"]["shuffled"]["n"] == 14  # of 16 orders two are the questions' own
    assert "same choice in all orders" in shown(robustness.tables(figures))


def gsm_plus(seed: str, kind: str, question: str, answer: str) -> dict:
    solution = f"So it is.\n#### {answer}"
    seeded = {"seed_question": seed, "seed_answer": "5", "seed_solution": "#### 5"}
    return {"question": question, "solution": solution, "answer": answer, "perturbation_type": kind, **seeded}


def test_gsm_plus_is_paired_with_the_seed_questions(bench, tmp_path):
    rows = []
    for n in range(3):
        seed = f"Seed {n}: 2 and 3?"
        rows += [
            gsm_plus(seed, "digits", f"Digits {n}: 20 and 30?", "50"),
            gsm_plus(seed, "words", f"Words {n}: two and three?", "5"),
        ]
    rows.append(gsm_plus("Seed 0: 2 and 3?", "critical thinking", "How many?", "None"))
    path = write(tmp_path / "plus" / "testmini.jsonl", rows)
    made = bench(lambda prompt, sampling: "The answer is 5.")
    settings = RobustnessConfig(distractors=False, gsm_plus=path, gsm_plus_seeds=2)
    figures = robustness.measure(made, settings)["gsm_plus"]
    kinds = {each["kind"]: each for each in figures["kinds"]}
    assert {kind: each["accuracy"]["n"] for kind, each in kinds.items()} == {"all": 4, "digits": 2, "words": 2}
    assert (kinds["digits"]["accuracy"]["value"], kinds["words"]["accuracy"]["value"]) == (0, 1)
    assert kinds["all"]["seed_accuracy"]["value"] == 1
    assert kinds["digits"]["drop_rate"]["value"] == 1
    assert kinds["all"]["accuracy"]["questions"] == 2
    assert figures["read"]["unanswerable_dropped"] == 1
    assert len(made.generation.scripted.prompts) == 6


def test_real_seed_questions_of_gsm_plus_are_graded():
    if not (DATA / "gsm_plus").is_dir():
        pytest.skip("the real data in ../shared/data is not there")
    items, judge = load("gsm_plus", DATASETS["gsm_plus"].test, DATA / "gsm_plus", 0).items, grader("numeric")
    golds = {item.group: item.meta["seed_answer"] for item in items}
    assert len(golds) > 250
    for seed, gold in golds.items():
        question = make_question("gsm_plus", "held_out", Item(seed, gold, ""))
        assert judge(question, f"The answer is {gold}.").verdict == "right"


def test_truthfulqa_weighs_answers_after_their_question(bench, tmp_path):
    targets = {"Nothing": 1, "It grows zzz": 0}
    several = {**targets, "It passes": 1}
    questions = ["What of seeds?", "What of stones?", "What of leaves?"]
    rows = [{"question": each, "mc1_targets": targets, "mc2_targets": several} for each in questions]
    write(tmp_path / "truthfulqa" / "mc_task.jsonl", rows)
    made = bench(lambda prompt, sampling: "")
    made.generation.scripted.likely = lambda text: -20.0 if "z" in text else -0.5
    settings = TruthfulQAConfig(path=str(tmp_path), questions=2, answers=False)
    found = truthfulqa.measure(made, settings)["choices"]
    assert (found["mc1"]["value"], found["mc1"]["n"], found["left_out"]) == (1, 2, 0)
    assert found["mc2"]["value"] > 0.999


def test_truthfulqa_scores_the_tokens_of_the_answer_alone(bench, form, tmp_path):
    made = bench(lambda prompt, sampling: "")
    choices = truthfulqa.Choices("What of seeds?", "Nothing", ("It grows",), ("Nothing",), ("It grows",))
    prompt, sequences = truthfulqa._sequences(made, choices)
    for answer, ids in sequences.items():
        assert form.tokenizer.decode(ids[prompt:].tolist()).strip() == answer
        assert form.tokenizer.eos_id not in ids


def test_truthfulqa_compares_what_is_said_with_true_and_false_references(bench, tmp_path):
    row = {"Type": "x", "Category": "y", "Best Answer": "Nothing happens", "Best Incorrect Answer": "You grow melons"}
    row |= {"Correct Answers": "Nothing happens; They pass through", "Incorrect Answers": "You grow melons"}
    rows = [{"Question": f"What of {each}?", **row, "Source": ""} for each in ("seeds", "stones")]
    write(tmp_path / "TruthfulQA.jsonl", rows)
    made = bench(lambda prompt, sampling: "They pass through" if "seeds" in prompt else "You grow melons")
    figures = truthfulqa.measure(made, TruthfulQAConfig(path=str(tmp_path), choices=False))
    scores = figures["answers"]["scores"]
    assert scores["ROUGE-1"]["true"]["value"] == 0.5
    assert scores["ROUGE-1"]["nearer"]["value"] == 0.5
    assert scores["BLEU"]["nearer"]["n"] == 2
    assert any("Answer in one sentence." in prompt for prompt in made.generation.scripted.prompts)
    assert "ROUGE-L" in shown(truthfulqa.tables(figures))


def hotpot(question: str, answer: str, title: str) -> dict:
    facts = {"context": [[title, ["It is so."]]], "supporting_facts": [[title, 0]]}
    return {"question": question, "answer": answer, "type": "bridge", "level": "hard", **facts}


def test_free_answers_are_held_against_gold_ones_by_document(bench, tmp_path):
    rows = [hotpot("Who?", "Ada Lovelace", "A"), hotpot("Where?", "Paris", "A"), hotpot("When?", "1900", "B")]
    write(tmp_path / "hotpotqa" / "dev_distractor.jsonl", rows)
    write(tmp_path / "hotpotqa" / "train.jsonl", [hotpot("Why?", "So", "C")])
    made = bench(lambda prompt, sampling: "The answer is Ada Lovelace." if "Who?" in prompt else "The answer is Rome.")
    settings = GeneralisationConfig([ElsewhereConfig("hotpotqa", str(tmp_path / "hotpotqa"), 3)])
    figures = generalisation.measure(made, settings)
    found = figures["hotpotqa"]
    assert (found["n"], found["documents"], found["left_out"]) == (3, 2, 0)
    assert found["scores"]["EM"]["value"] == pytest.approx(1 / 3)
    assert list(found["scores"]) == ["EM", "F1", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU"]
    assert "hotpotqa" in shown(generalisation.tables(figures))


def test_documents_that_a_model_cannot_take_are_left_out_and_counted(bench, tmp_path):
    rows = [hotpot("Who?", "Ada", "A"), hotpot("Where?", "Paris", "Long " * 900)]
    write(tmp_path / "hotpotqa" / "dev_distractor.jsonl", rows)
    write(tmp_path / "hotpotqa" / "train.jsonl", [hotpot("Why?", "So", "C")])
    made = bench(lambda prompt, sampling: "The answer is Ada.", positions=400)
    settings = GeneralisationConfig([ElsewhereConfig("hotpotqa", str(tmp_path / "hotpotqa"), 2)])
    found = generalisation.measure(made, settings)["hotpotqa"]
    assert (found["n"], found["left_out"]) == (1, 1)


def test_too_few_questions_elsewhere_name_the_task(bench, tmp_path):
    write(tmp_path / "hotpotqa" / "dev_distractor.jsonl", [hotpot("Who?", "Ada", "A")])
    write(tmp_path / "hotpotqa" / "train.jsonl", [hotpot("Why?", "So", "C")])
    settings = GeneralisationConfig([ElsewhereConfig("hotpotqa", str(tmp_path / "hotpotqa"), 9)])
    with pytest.raises(UsageError, match=r"generalisation\.tasks, hotpotqa"):
        generalisation.measure(bench(lambda prompt, sampling: ""), settings)


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> list[Path]:
    directory = tmp_path_factory.mktemp("judges")
    return [real_server.make_model(directory / f"m{seed}", seed, positions=2048) for seed in range(2)]


def judging(prompt: str, sampling) -> str:
    if sampling.regex is None:
        return "Seven and five are 12. The answer is 12."
    return "4" if AXES["coherence"] in prompt else "2"


@pytest.mark.slow
def test_judges_mark_each_axis_and_go_on_where_they_were(bench, judges):
    settings = QualityConfig([JudgeConfig(str(directory)) for directory in judges], questions=3)
    theirs = make_format(judges[0], PromptConfig())
    killed = bench(judging, questions=4, asked_in=theirs, kill_at=3 + 12 + 5)
    with pytest.raises(Killed):
        quality.measure(killed, settings)
    known = (killed.run.directory / "quality_judge_2" / "marks.jsonl").read_text().count("\n")
    assert 0 < known < 12
    made = bench(judging, questions=4, asked_in=theirs)
    figures = quality.measure(made, settings)
    # The answers and the first judge's marks are kept, and those that the second had given.
    assert len(made.generation.scripted.prompts) == 12 - known
    assert [each["mean"]["value"] for each in figures["axes"]["coherence"]] == [4, 4]
    assert [each["counts"] for each in figures["axes"]["decomposition"]] == [[0, 3, 0, 0, 0]] * 2
    assert figures["agreement"]["coherence"]["exact"] == pytest.approx(
        {"value": 1, "low": figures["agreement"]["coherence"]["exact"]["low"], "high": 1, "n": 3, "questions": 3}
    )
    assert "equal marks" in shown(quality.tables(figures))


@pytest.mark.slow
def test_a_base_with_another_tokenizer_is_refused(bench, judges):
    with pytest.raises(UsageError, match=r"retention\.base: .* has another tokenizer"):
        retention.measure(bench(judging), RetentionConfig(base=str(judges[0])))


def test_data_that_is_not_there_is_told_by_its_own_key(bench, tmp_path):
    made = bench(judging)
    gone, empty = str(tmp_path / "gone"), tmp_path / "empty"
    empty.mkdir()
    for path, message in ((gone, "robustness.gsm_plus names"), (str(empty), "robustness.gsm_plus: .* has no file")):
        with pytest.raises(UsageError, match=message):
            robustness.measure(made, RobustnessConfig(distractors=False, gsm_plus=path))
    for path, message in ((gone, "truthfulqa.path names"), (str(empty), "truthfulqa.path: .* has no file")):
        for part in ({"answers": False}, {"choices": False}):
            with pytest.raises(UsageError, match=message):
                truthfulqa.measure(made, TruthfulQAConfig(path=path, **part))


def test_a_judge_that_is_not_there_is_told_before_anything_is_asked(bench, tmp_path):
    made = bench(judging)
    with pytest.raises(UsageError, match=r"quality\.judges: .*gone.* no such directory"):
        quality.measure(made, QualityConfig([JudgeConfig(str(tmp_path / "gone"))]))
    assert not made.generation.scripted.prompts


def parse(*arguments: str):
    return config.parse_evaluate(["--model", "m", *arguments], "agentark evaluate", "")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suites", "[retention]"], "retention.base is missing"),
        (["--suites", "[quality]"], "quality.judges is empty"),
        (["--suites", "[generalisation]"], "generalisation.tasks is empty"),
        (["--generalisation.tasks", "[{name: gsm8k}]"], "generalisation.tasks has the name 'gsm8k': use some of"),
        (["--generalisation.tasks", "[{name: qmsum}, {name: qmsum}]"], "name each once"),
        (["--generalisation.tasks", "[{name: qmsum, questions: 0}]"], "qmsum: questions is 0"),
        (["--quality.judges", "[{model: a}, {model: b}, {model: c}]"], "quality.judges are 3: give one or two"),
        (["--robustness.orders", "-1"], "robustness.orders is -1"),
        (["--robustness.gsm_plus", ""], "robustness.gsm_plus is empty"),
        (["--truthfulqa.choices", "false", "--truthfulqa.answers", "false"], "are both false"),
        (
            ["--suites", "[truthfulqa]", "--api", "openai", "--engine.servers", "['http://host:1/v1']"],
            "truthfulqa.choices needs log-probabilities",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_key_and_the_fix(arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse(*arguments)


def test_lists_of_tasks_and_judges_are_read():
    found = parse(
        "--suites", "[generalisation, quality]",
        "--generalisation.tasks", "[{name: hotpotqa, path: here}, {name: qmsum, questions: 7}]",
        "--quality.judges", "[{model: a}, {model: b, servers: ['http://host:1']}]",
    )  # fmt: skip
    assert found.generalisation.tasks == [ElsewhereConfig("hotpotqa", "here"), ElsewhereConfig("qmsum", None, 7)]
    assert found.quality.judges == [JudgeConfig("a"), JudgeConfig("b", ["http://host:1"])]


@pytest.mark.slow
def test_a_real_model_goes_through_all_suites_once(judges, tmp_path):
    write(tmp_path / "plus" / "testmini.jsonl", [gsm_plus("Seed: 2 and 3?", "digits", "Digits: 20 and 30?", "50")])
    targets = {"Nothing": 1, "It grows": 0}
    rows = [{"question": f"What of {n}?", "mc1_targets": targets, "mc2_targets": targets} for n in range(3)]
    write(tmp_path / "mc_task.jsonl", rows)
    model, base = judges
    command = [sys.executable, "-m", "agentark_jax.cli", "evaluate", "--model", str(model), "--root", str(tmp_path)]
    command += ["--questions", "3", "--max_tokens", "8", "--suites", "[robustness, truthfulqa, retention, quality]"]
    command += ["--robustness.gsm_plus", str(tmp_path / "plus"), "--truthfulqa.path", str(tmp_path)]
    command += ["--truthfulqa.answers", "false", "--retention.base", str(model), "--quality.questions", "2"]
    command += ["--quality.judges", f"[{{model: {base}}}]"]

    def complete() -> str:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    complete()
    results = (tmp_path / "evaluation" / "results.json").read_text()
    suites = json.loads(results)["suites"]
    kept = suites["retention"]["by_token"]
    # The base of this one is the model itself.
    assert kept["forward_kl"]["value"] == kept["reverse_kl"]["value"] == 0
    assert kept["nll"]["base"] == kept["nll"]["model"]
    assert suites["retention"]["tokens"] > 0
    assert suites["truthfulqa"]["choices"]["mc1"]["n"] == 3
    assert (
        sum(suites["quality"]["axes"]["coherence"][0]["counts"]) + suites["quality"]["axes"]["coherence"][0]["unread"]
        == 2
    )
    assert "nothing was generated" in complete()
    assert (tmp_path / "evaluation" / "results.json").read_text() == results
