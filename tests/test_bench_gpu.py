"""The benchmarks for a GPU: their arithmetic, what they refuse, and that they run to their end with tiny shapes."""

import json
from pathlib import Path

import numpy as np
import pytest

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.flops import decode_bytes
from benchmarks import generation, gpu_generation, gpu_inputs, gpu_jax, gpu_sft, peers, results, run
from benchmarks.results import Spread
from benchmarks.workers import ROOT, Side

TINY = ModelConfig.from_hf(gpu_inputs.shape_of("tiny Qwen/Qwen3-0.6B"), "test")


def on_gpu(*seconds: float, loss: float = 12.0, norm: float = 2.0) -> list[dict]:
    figures = {"losses": [loss, loss], "gradient_norms": [norm, 9.0], "peak_device_gb": 60.0}
    return [{"seconds": value, **figures} for value in seconds]


def test_the_ratios_are_those_of_the_faster_way_of_ours_over_every_peer():
    measured = {
        gpu_sft.OURS: on_gpu(9, 4, 4, 5),
        gpu_sft.FULL: on_gpu(9, 2, 2, 3),
        "torch": on_gpu(9, 4, 5, 6),
        "torch, all in bf16": on_gpu(9, 2, 2, 2),
    }
    sound, unsound = gpu_sft.ratios(measured)
    assert (sound.of, sound.over, sound.goal) == (gpu_sft.FULL, "torch", 1.2)
    assert (sound.value.median, sound.value.low, sound.value.high) == (2.0, 4 / 3, 3.0)
    assert (unsound.over, unsound.goal, unsound.value.median) == ("torch, all in bf16", None, 1.0)


def test_utilisation_is_the_counted_work_of_a_step_over_the_peak():
    measured = {gpu_sft.OURS: on_gpu(9, 2, 2, 3), gpu_sft.FULL: on_gpu(9, 4, 4, 5)}
    first, second = gpu_sft.utilisation(measured, 989 * 10**12, 989e12, "NVIDIA H100 80GB HBM3")
    assert (first.value, second.value) == (0.5, 0.25)
    assert first.limit is None
    assert "989 TFLOP/s by its data sheet; wanted: at least 0.5" in first.what


def test_sides_that_do_other_work_are_not_timed():
    same = {"a": on_gpu(1)[0], "b": on_gpu(1, loss=12.012, norm=2.04)[0]}
    losses, norms = gpu_sft.compare(same)
    assert (losses.value, norms.value) == (pytest.approx(0.012 / 12.012), pytest.approx(0.04 / 2.04))
    for other in ({"loss": 12.1}, {"norm": 2.2}, {"loss": np.nan}, {"norm": np.nan}):
        with pytest.raises(AgentArkError, match="do not do the same work"):
            gpu_sft.compare({**same, "c": on_gpu(1, **other)[0]})
    sizes = gpu_generation.Sizes(prompts=2, new_tokens=8)
    good = {"new_tokens": [8, 8], "score_difference": 0.05}
    assert gpu_generation.compare(good, sizes).value == 0.05
    for other in ({"new_tokens": [8, 7]}, {"new_tokens": [8]}, {"score_difference": 0.2}, {"score_difference": np.nan}):
        with pytest.raises(AgentArkError, match="gpu_generation"):
            gpu_generation.compare({**good, **other}, sizes)


def test_every_step_has_ids_of_its_own_and_the_first_of_a_repetition_is_one_more():
    ids = gpu_sft.step_ids(512, gpu_sft.Sizes(rows=2, row_length=16, steps=3, repetitions=4))
    assert ids.shape == (5, 4, 2, 16)
    assert len({step.tobytes() for repetition in ids for step in repetition}) == 20


def test_decoding_is_counted_without_the_first_tokens():
    replies = [{"seconds": value, "first_token_seconds": 1.0} for value in (100.0, 3.0, 5.0, 6.0)]
    assert gpu_generation.after_the_first(replies, gpu_generation.Sizes(prompts=4, new_tokens=11)) == 10.0


def test_bf16_halves_the_bytes_of_the_floor():
    rates = dict.fromkeys(("prefill", "decode", "head"), 1e30)
    steps = generation.schedule([5, 9], [4, 4], 2)
    halves = [generation.floor_seconds(TINY, [5, 9], steps, rates, 1e3, width) for width in (4, 2)]
    assert halves[0] == 2 * halves[1]
    assert decode_bytes(TINY, [3, 4], 2) * 2 == decode_bytes(TINY, [3, 4])


class FakeWorker:
    """A side that answers at once, from its setup."""

    def __init__(self, side: Side) -> None:
        self.ready = {"platform": side.setup["platform"]}

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *error: object) -> None: ...

    def repeat(self, index: int) -> dict:
        return {"seconds": float(index)}


def test_where_a_side_finds_no_gpu_it_is_not_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_inputs, "Worker", FakeWorker)
    sides = [Side(name, "", {"platform": platform}) for name, platform in (("ours", "gpu"), ("torch", "cpu"))]
    checked: list[dict] = []
    with pytest.raises(UsageError, match=r"'torch' finds no GPU.*\[cuda\]"):
        gpu_inputs.alone(sides, 2, checked.append, lambda message: None, anywhere=False)
    assert [set(replies) for replies in checked] == [{"ours"}]
    replies = gpu_inputs.alone(sides, 2, checked.append, lambda message: None, anywhere=True)
    assert {side: [reply["seconds"] for reply in found] for side, found in replies.items()} == {
        "ours": [0.0, 1.0, 2.0],
        "torch": [0.0, 1.0, 2.0],
    }
    assert set(checked[-1]) == {"ours", "torch"}

    def disagree(replies: dict) -> None:
        raise AgentArkError("no")

    with pytest.raises(AgentArkError, match="no"):
        gpu_inputs.alone(sides, 2, disagree, lambda message: None, anywhere=True)


def test_the_machine_has_rates_and_no_peak_where_none_is_known():
    setup = {"side": "machine", "shapes": {"product": [64, 32, 16]}, "bandwidth_bytes": 2**16}
    repeat, facts = gpu_jax.build(setup)
    assert (facts["platform"], facts["peak_flops"]) == ("cpu", None)
    reply = repeat(0)
    assert 0 < reply["rates"]["product"] < 1e15
    assert reply["bandwidth"] > 0


def test_the_suite_needs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def refuse(model: Path, name: str, **settings: object):
        raise UsageError(f"as far as this: {settings['quick']}")

    monkeypatch.setitem(run.SUITES["gpu"], gpu_sft.NAME, refuse)
    arguments = ["--suite", "gpu", "--quick", "--model", str(tmp_path / "missing"), "--results", str(tmp_path)]
    assert run.main(arguments) == UsageError.exit_code
    assert "as far as this: True" in capsys.readouterr().err


def test_tables_name_the_accelerator_and_the_precision(tmp_path: Path):
    spread = Spread.of([1.0])
    row = results.Row("ours", "ours", spread, spread, {}, 1.0, 1.0, 1, 0.5)
    result = results.Result(
        benchmark=gpu_generation.NAME,
        title="Title",
        unit="tokens/s",
        quick=False,
        model={"name": "shape of x", "precision": "bf16"},
        sizes={"prompts": 4},
        rows=[row],
        ratios=[],
        checks=[],
        rates={},
        environment={**results.environment(), "accelerator": "NVIDIA H100 80GB HBM3"},
    )
    table = results.table(results.read(results.write(result, tmp_path)))
    for words in ("peak memory of the host |", "100% (100% – 100%, goal 50%)", "shape of x, bf16; ", "\nNVIDIA H100"):
        assert words in table
    assert run.main(["--suite", "gpu", "--table", "--results", str(tmp_path)]) == 0


def test_peers_need_nothing_of_ours_but_the_workers():
    """What runs in their environment finds no other package of this repository there."""
    for side in {peer.module for peer in gpu_sft.PEERS.values()}:
        text = (ROOT / f"{side.replace('.', '/')}.py").read_text()
        imported = {line.split()[1] for line in text.splitlines() if line.startswith(("from benchmarks", "from agent"))}
        assert imported <= {"benchmarks.workers", "benchmarks.gpu_torch"}


def rehearsed(module, directory: Path, **settings):
    """The benchmark's only result, which its file holds as it is."""
    (result,) = module.run(directory, "", quick=True, say=lambda message: None, **settings)
    assert results.read(results.write(result, directory)) == result
    return result


@pytest.mark.slow
@pytest.mark.parametrize("against_peers", [False, True])
def test_training_runs_to_its_end_with_a_tiny_shape(against_peers: bool, tmp_path: Path):
    if against_peers:
        try:
            peers.python("trl")
        except UsageError as error:
            pytest.skip(str(error))
    sizes = gpu_sft.Sizes(rows=2, row_length=64, steps=2, repetitions=1)
    result = rehearsed(gpu_sft, tmp_path, peers=against_peers, shape="tiny Qwen/Qwen3-1.7B", sizes=sizes)
    not_compiled = {name for name, peer in gpu_sft.PEERS.items() if not peer.compiled}
    assert {row.name for row in result.rows} - set(gpu_sft.REMAT) == (not_compiled if against_peers else set())
    assert "shape of tiny Qwen/Qwen3-1.7B, bf16, fp32 masters" in results.table(result)
    assert result.sizes["loss_tokens"] == 126
    json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.slow
def test_generation_runs_to_its_end_with_a_tiny_shape(tmp_path: Path):
    sizes = gpu_generation.Sizes(prompts=3, prompt_tokens=20, new_tokens=8, repetitions=1)
    result = rehearsed(gpu_generation, tmp_path, peers=False, shape="tiny Qwen/Qwen3-0.6B", sizes=sizes)
    assert result.rows[0].floor_goal == 0.5
