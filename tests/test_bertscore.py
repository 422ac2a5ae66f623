"""BERTScore against its definition, on tiny random encoders: no network, no code of others."""

import json
import socket
import sys

import numpy as np
import pytest

from agentark_jax.errors import AgentArkError, UsageError

torch = pytest.importorskip("torch", reason="torch is not installed (extra `test`)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `test`)")
pytest.importorskip("bert_score", reason="bert-score is not installed (extra `bertscore`)")

from test_judge import QUESTION, said  # noqa: E402
from test_traces_cli import cells, run  # noqa: E402

from agentark_jax.tasks.grading import bertscore, grader, short  # noqa: E402
from agentark_jax.tasks.grading.bertscore import BERTScore  # noqa: E402
from agentark_jax.traces.labels import label_store  # noqa: E402
from agentark_jax.traces.store import TraceStore  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "cat", "dog", "sat", "on", "mat", "##s", "seven", "7", "no"]
ANSWERS = ["the cat sat on the mats", "a dog", "", "seven", "the dog sat", "  ", "7"]
GOLDS = [["cats on a mat", "the mat"], ["a dog", "a cat"], ["no"], ["7", "seven cats"], ["dogs"], ["a"], [""]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # In a folder whose name is a kind of model, which must not matter.
    directory = tmp_path_factory.mktemp("t5")
    (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, initializer_range=1.0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(directory)
    return directory


def by_hand(directory, layer, answer, gold):
    """A text at a time: the mean cosine of each token with the nearest of the other's, both ways."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    encoder = transformers.AutoModel.from_pretrained(directory).eval()

    def embedded(text):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            vectors = encoder(ids, output_hidden_states=True).hidden_states[layer][0].numpy()
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    a, b = embedded(answer), embedded(gold)
    # The first and the last token count nothing, but may be matched with.
    precision, recall = (a @ b.T).max(axis=1)[1:-1].mean(), (b @ a.T).max(axis=1)[1:-1].mean()
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("layer", [None, 1, 2])
def test_the_score_is_that_of_greedy_matching(model, layer, monkeypatch):
    monkeypatch.setattr(bertscore, "_PAIRS", 3)
    scorer = BERTScore(str(model), layer)
    assert scorer.layer == (layer or 3)
    for answer, golds, score in zip(ANSWERS, GOLDS, scorer(ANSWERS, GOLDS), strict=True):
        wanted = [by_hand(model, scorer.layer, answer, gold) for gold in golds if answer.strip() and gold]
        assert score == pytest.approx(max(wanted, default=0.0), abs=1e-5)


def test_identical_texts_score_one_and_others_less(model, capsys):
    scorer = BERTScore(str(model), 2)
    assert "UNEXPECTED" not in "".join(capsys.readouterr()), "layers that are not needed are nothing to tell"
    texts = ["the cat sat on the mat", "7", "a dog"]
    assert scorer(texts, [[text] for text in texts]) == pytest.approx([1, 1, 1], abs=1e-6)
    assert scorer(texts, [["no", text] for text in texts]) == pytest.approx([1, 1, 1], abs=1e-6)
    assert max(scorer(texts, [["no"]] * 3)) < 0.999
    assert scorer([], []) == []
    (long,) = scorer(["the cat " * 60], [["the cat " * 60]])
    assert long == pytest.approx(1, abs=1e-6), "longer than the model takes"


def test_another_family(tmp_path):
    """RoBERTa's positions begin after its padding's, and its words with a space."""
    characters = {chr(n): n for n in range(33, 127)} | {"Ġ": 127}
    vocabulary = {name: n for n, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *characters])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.RobertaTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    tokenizer.save_pretrained(tmp_path)
    config = transformers.RobertaConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=34,
    )  # fmt: skip
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    scorer = BERTScore(str(tmp_path))
    assert scorer(["the cat " * 20, "a dog"], [["the cat " * 20], ["a dog"]]) == pytest.approx([1, 1], abs=1e-5)


def test_of_a_directory_nothing_is_fetched_and_nothing_runs(model, tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    BERTScore(str(model))
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UsageError, match="cannot be loaded"):
        BERTScore(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_what_is_no_model_is_named(model, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"no directory with a config\.json"):
        BERTScore(str(tmp_path))
    with pytest.raises(UsageError, match=r"no directory with a config\.json"):
        BERTScore("./nowhere")
    for layer in (0, 4):
        with pytest.raises(UsageError, match=f"--bertscore-layer {layer}: .* has 3"):
            BERTScore(str(model), layer)
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(UsageError, match=r"has no weights encoder\.layer\.3"):
        BERTScore(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be loaded"):
        BERTScore(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AgentArkError, match="cannot be loaded"):
        BERTScore("nobody/nothing")
    monkeypatch.setitem(sys.modules, "bert_score", None)
    monkeypatch.setattr(bertscore, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[bertscore\]'"):
        BERTScore(str(model))


def test_an_audit_tells_it_and_it_decides_nothing(model, tmp_path, capsys):
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_questions([QUESTION])
        store.record_many([said("The answer is 7.", 0), said("The answer is seven.", 1), said("One.\nTwo.", 2)])
        label_store(store, grader("short"), grader("short").id)
        labels = store.labels(grader("short").id)
    code, out, _ = run(capsys, "audit", tmp_path, "--bertscore", model, "--bertscore-layer", "2")
    assert code == 0
    (row,) = cells(out)
    near = by_hand(model, 2, "seven", "7")
    assert row[-1] == f"{100 * (1 + near + 0) / 3:.1f}"
    assert all(name in out for name in (*short.SCORES, "BERTScore"))
    assert "BERTScore by layer 2 of" in out
    with TraceStore(tmp_path / "traces.sqlite", read_only=True) as store:
        assert store.labels(grader("short").id) == labels
    code, out, _ = run(capsys, "audit", tmp_path)
    assert "BERTScore" not in out


def test_it_is_of_a_stores_short_answers(model, tmp_path, capsys):
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_questions([QUESTION])
        store.record_many([said("The answer is 7.", 0)])
        for name in ("numeric", "symbolic"):
            label_store(store, grader(name), grader(name).id)
    code, _, err = run(capsys, "audit", tmp_path, "--bertscore", model)
    assert (code, "no labels of the grader short" in " ".join(err.split())) == (2, True)
    (tmp_path / "texts.jsonl").write_text("{}")
    code, _, err = run(capsys, "audit", "--labelled", tmp_path / "texts.jsonl", "--bertscore", model)
    assert (code, "without --labelled" in " ".join(err.split())) == (2, True)
