"""Prompts and examples: ids reused verbatim, loss on completions only, templates that round-trip."""

import json

import numpy as np
import pytest

from agentark_jax.data.render import OWN_FIRST, completion_example, revision_example
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.records import Question

QUESTION = Question.make("task", "debate", "Mia has 3 apples. How many?", "3")


def test_a_question_prompt_reads_as_written_and_ends_ready_to_answer(form):
    text = form.tokenizer.decode([token for segment in form.question(QUESTION) for token in segment])
    assert text == "Question: Mia has 3 apples. How many?\nAnswer:"


def test_a_response_ends_with_the_end_token_and_decodes_to_its_text(form):
    ids = form.response("3 + 4 = 7. The answer is 7.")
    assert ids[-1] == form.tokenizer.eos_id
    assert form.tokenizer.eos_id not in ids[:-1]
    assert form.tokenizer.decode(ids) == "\n3 + 4 = 7. The answer is 7."


@pytest.mark.parametrize("alone", [True, False])
def test_every_answer_takes_its_turn_as_the_own_one_with_or_without_the_others_in_sight(form, alone):
    answers = {name: form.response(name) for name in ("first", "second", "third")}
    for index, own in enumerate([*answers, "first"]):
        example = revision_example(form, QUESTION, answers, index, OWN_FIRST, alone=alone)
        told = form.tokenizer.decode([token for token in example.ids.tolist() if token != form.tokenizer.eos_id])
        others = "" if alone else "".join(f"\nAnother answer:\n{name}" for name in answers if name != own)
        head = "Question: Mia has 3 apples. How many?\nMy answer:"
        assert told.startswith(f"{head}\n{own}{others}\nBetter answer:")
        assert example.weights["completion"].sum() == len(form.response(QUESTION.rationale))


def test_a_revision_holds_every_answer_verbatim_without_its_end_token(form):
    own, peers = form.response("mine"), [form.response("first"), form.response("second")]
    prompt = form.revision(QUESTION, own, peers)
    assert own[:-1] in prompt
    assert all(peer[:-1] in prompt for peer in peers)
    flat = [token for segment in prompt for token in segment]
    assert form.tokenizer.eos_id not in flat
    assert form.tokenizer.decode(flat) == (
        "Question: Mia has 3 apples. How many?\n"
        "My answer:\nmine\nAnother answer:\nfirst\nAnother answer:\nsecond\nBetter answer:"
    )


def test_an_instruction_quotes_sampled_ids(form):
    said = form.response("mine")
    prompt = form.instruction(["Weigh this:", said, "\n\nWell?"])
    assert prompt[0][0] == form.tokenizer.bos_id
    assert said[:-1] in prompt
    assert form.tokenizer.decode([token for segment in prompt for token in segment]) == (
        "Weigh this:\nmine\n\nWell?\nAnswer:"
    )


def test_ids_that_would_encode_differently_enter_unchanged(form):
    # Two tokens whose text the tokenizer would merge into one.
    pieces = (*form.tokenizer.encode("Answ"), *form.tokenizer.encode("er"))
    assert form.tokenizer.encode("Answer") != pieces
    assert pieces in form.revision(QUESTION, (*pieces, form.tokenizer.eos_id), [])


def test_only_completion_tokens_have_loss_and_the_end_token_is_one(form):
    completion = form.response("The answer is 3.")
    prompt = form.question(QUESTION)
    example = completion_example(prompt, completion, question_id="q", variant="gold")
    length = sum(map(len, prompt))
    np.testing.assert_array_equal(example.weights["completion"], [0] * length + [1] * len(completion))
    assert example.ids[-1] == form.tokenizer.eos_id
    with pytest.raises(AgentArkError, match="question q"):
        completion_example(prompt, [], question_id="q", variant="gold")


def test_digits_are_separate_tokens(form):
    assert len(form.tokenizer.encode("1234")) == 4


def test_what_changes_a_prompt_changes_the_template_hash(form, monkeypatch):
    before = form.hash
    monkeypatch.setattr(type(form), "PEER", "\nPeer:")
    assert type(form)(form.tokenizer).hash != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer_config.json", None, "tokenizer_config.json"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", "{}", "eos_token"),
        ("tokenizer_config.json", '{"eos_token": "<nope>"}', "<nope>"),
    ],
)
def test_a_broken_tokenizer_directory_is_named(tmp_path, form, name, content, message):
    files = {
        "tokenizer.json": form.tokenizer._tokenizer.to_str(),
        "tokenizer_config.json": json.dumps({"eos_token": {"content": "<eos>"}}),
    }
    files[name] = content
    for file, text in files.items():
        if text is not None:
            (tmp_path / file).write_text(text)
    with pytest.raises(UsageError, match=message):
        Tokenizer(tmp_path)
