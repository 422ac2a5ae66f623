"""A tiny process reward model learns to find planted errors, better than what reads nothing."""

from dataclasses import replace

import numpy as np
import pytest
from prm_models import spoiled, student, turn_of
from rich.console import Console

from agentark_jax.data.config import PromptConfig
from agentark_jax.data.render import step_example
from agentark_jax.data.steps import steps
from agentark_jax.evaluation.first_error_baselines import LENGTH_ONLY, MAJORITY, Judged, compare
from agentark_jax.models.transformer import init_params
from agentark_jax.models.weights import save_pretrained, weights_fingerprint
from agentark_jax.process import train_prm
from agentark_jax.progress import Display
from agentark_jax.stages import Work
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems, exact_step_truth
from agentark_jax.training.config import FitConfig, MeshConfig
from agentark_jax.training.mesh import make_mesh
from agentark_jax.training.prm import load_prm
from agentark_jax.training.prm_config import PRMConfig
from agentark_jax.training.scoring import score_steps

# Sums and differences up to nine: the model has to know what they make, and nothing else tells.
TASK = WordProblems(TaskConfig(steps=(2, 3), operations=("+", "-"), max_number=7, max_value=9))
FIT = FitConfig(learning_rate=3e-3, rows=16, row_length=128, epochs=1, checkpoint_every=10_000, weight_decay=0.0)
CONFIG = PRMConfig(
    coefficients={"cross_entropy": 1.0, "contrastive": 0.5},
    frozen=replace(FIT, last_layers=1, epochs=1),
    whole=replace(FIT, epochs=6),
)


def asked(split, count):
    """Questions told in numbers alone, so that little has to be read; their answers and truths are the task's."""
    for question in TASK.questions(split, count):
        told = str(question.meta["start"])
        for operation, operand in zip(question.meta["operations"], question.meta["operands"], strict=True):
            told += f" {operation} {operand}"
        yield replace(question, prompt=f"{told} ({question.id[:4]})")


def answers(form, split, count):
    """(example, what is true of it) of a right answer and one with a planted error to each question."""
    rng = np.random.default_rng(0)
    for question in asked(split, count):
        places = [None, int(rng.integers(0, len(question.meta["values"])))]
        for agent, place in enumerate(places):
            text = question.rationale if place is None else spoiled(question, place)
            turn = turn_of(form, question, text, agent)
            found = steps(turn.completion.ids.tolist(), form.tokenizer)
            truth = exact_step_truth(question, [step.text for step in found])
            example = step_example(form, question, turn, [float(right) for right in truth])
            lengths = np.asarray([step.end - step.start for step in found])
            known = np.ones(len(found), bool)
            yield example, (question.id, lengths, np.asarray(truth), known, np.arange(len(found)), place)


def learned(directory):
    """What the trained model and the baselines find in new questions, and the record of the training."""
    tiny = student(directory / "student", hidden_size=64, heads=4, head_dim=16, intermediate_size=128)
    save_pretrained(tiny.directory, tiny.config, init_params(tiny.config, 1), tiny.directory)
    tiny = replace(tiny, revision=weights_fingerprint(tiny.directory))
    examples = [example for example, _ in answers(tiny.form, "debate", 900)]
    work = Work(directory / "prm")
    work.directory.mkdir()
    place = train_prm(work, CONFIG, tiny, PromptConfig(), examples, seed=0, display=Display(Console(quiet=True)))
    mesh = make_mesh(MeshConfig())
    model = load_prm(place, mesh)
    new = list(answers(tiny.form, "held_out", 150))
    scores = score_steps(model.config, model.params, model.head, [(each.ids, each.step_ends) for each, _ in new], mesh)
    judged = [Judged(question, right, *rest) for (_, (question, *rest)), right in zip(new, scores, strict=True)]
    return compare(judged, 0.5, name="model"), work.counts


@pytest.mark.slow
def test_planted_errors_are_found_better_than_by_who_reads_nothing(tmp_path):
    found, _ = learned(tmp_path)
    for baseline in (MAJORITY, LENGTH_ONLY):
        assert found["model"].errors.f1 > 0.2 + found[baseline].errors.f1
        assert found[baseline].f1_over.low > 0.1
        assert found[baseline].model_over.difference > 0
        assert found["model"].calibration.brier < found[baseline].calibration.brier
