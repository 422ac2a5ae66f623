"""`agentark fit --dry-run`: what a fit needs, against hand counts, published sizes and the compilers."""

import importlib.util
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from agentark_jax import preflight
from agentark_jax.cli import main
from agentark_jax.errors import UsageError
from agentark_jax.models.config import Lora, ModelConfig
from agentark_jax.models.published import PUBLISHED, describe
from agentark_jax.models.source import ModelSourceConfig, ScratchConfig
from agentark_jax.models.transformer import param_shapes
from agentark_jax.training.config import FitConfig, MeshConfig

ROOT = Path(__file__).parents[1]
SCRATCH = ScratchConfig(hidden_size=64, layers=3, heads=4, kv_heads=2, head_dim=16, intermediate_size=128)
FAMILIES = ("Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-1.5B", "meta-llama/Llama-3.2-1B", "google/gemma-7b", "google/gemma-3-1b")


def tiny(source: str) -> ModelConfig:
    """A family in small: two layers, or, where their types differ, one repetition of the pattern and one layer more."""
    full = describe(ModelSourceConfig(source))
    layers = full.layer_types[: full.period + 1]
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    return replace(full, vocab_size=1024, layer_types=layers, **sizes)


def report(topology: str, model: ModelConfig | None = None, **fit: object) -> preflight.Report:
    shape = describe(ModelSourceConfig("scratch", SCRATCH)) if model is None else model
    return preflight.preflight("a model", shape, FitConfig(**fit), preflight.topology(topology))


@pytest.mark.parametrize(
    ("source", "parameters"),
    [
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-14B", 14_768_307_200),
        ("Qwen/Qwen3-32B", 32_762_123_264),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
        ("google/gemma-7b", 8_537_680_896),
        ("google/gemma-3-270m", 268_098_176),
        ("gguf:gemma3-270m", 268_098_176),
        ("google/gemma-3-1b-it", 999_885_952),
        # Published with their vision tower (416,866,032) and the projection from it (1152 · hidden size + 1152).
        ("google/gemma-3-4b-it", 4_300_079_472 - 416_866_032 - 1152 * 2561),
        ("google/gemma-3-12b-it", 12_187_325_040 - 416_866_032 - 1152 * 3841),
        ("./models/gemma-3-27b-it", 27_432_406_640 - 416_866_032 - 1152 * 5377),
    ],
)
def test_published_models_have_the_published_number_of_parameters(source: str, parameters: int) -> None:
    shapes = param_shapes(describe(ModelSourceConfig(source)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters


def test_a_directory_needs_no_weights_and_an_unreachable_source_says_what_would_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen/Qwen3-8B"]))
    assert describe(ModelSourceConfig(str(tmp_path))) == describe(ModelSourceConfig("Qwen/Qwen3-8B-Base"))
    with pytest.raises(UsageError, match=r"model\.source: 'a b/c' is neither a directory nor a hub id"):
        describe(ModelSourceConfig("a b/c"))
    with pytest.raises(UsageError, match=r"model\.source: \./models/gemma-9: no such directory"):
        describe(ModelSourceConfig("./models/gemma-9"))


@pytest.mark.parametrize("freeze", [[], ["embedding"]])
def test_state_bytes_equal_a_hand_count(freeze: list[str]) -> None:
    found = report("4xH100-80GB", freeze=freeze)
    layer = 64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 128
    embedding, layers, norms = 512 * 64, 3 * layer, 3 * (2 * 64 + 2 * 16) + 64
    trained = (0 if freeze else embedding) // 4 + layers // 4 + norms
    assert found.parameters == embedding + layers + norms
    assert found.trainable == found.parameters - (embedding if freeze else 0)
    assert found.parameter_bytes == 4 * (embedding // 4 + layers // 4 + norms)
    counters = 3 * 4  # of the state, of Adam and of the schedule
    assert found.optimizer_bytes == 2 * 4 * trained + counters


def test_the_state_is_divided_by_fsdp_and_tensor_and_repeated_by_data() -> None:
    divided = report("8xH100-80GB", rows=8).state_bytes
    assert report("8xH100-80GB", rows=8, mesh=MeshConfig(1, 4, 2)).state_bytes == pytest.approx(divided, rel=0.05)
    assert report("8xH100-80GB", rows=8, mesh=MeshConfig(2, 4, 1)).state_bytes > 1.8 * divided
    assert report("1xH100-80GB").state_bytes == pytest.approx(8 * divided, rel=0.05)


def test_the_model_of_activations_follows_what_a_fit_sets() -> None:
    def beyond(**fit: object) -> int:
        settings = {"rows": 64, "row_length": 1024, **fit}
        found = report("8xH100-80GB", describe(ModelSourceConfig("Qwen/Qwen3-8B")), **settings)
        return found.step.total - found.state_bytes

    by_remat = [beyond(remat=remat) for remat in ("none", "products", "outputs", "full")]
    assert by_remat == sorted(by_remat, reverse=True)
    assert beyond(compute_dtype="bfloat16") < beyond()
    assert beyond(accumulation=8) < beyond()
    assert beyond(rows=16) < beyond()


def test_the_model_of_activations_has_scores_only_where_no_kernel_computes_attention() -> None:
    def beyond(model: ModelConfig, rows: int, row_length: int, **fit: object) -> int:
        found = report("1xH100-80GB", model, rows=rows, row_length=row_length, compute_dtype="bfloat16", **fit)
        return found.step.total - found.state_bytes

    qwen = describe(ModelSourceConfig("Qwen/Qwen3-0.6B"))
    assert beyond(qwen, 64, 1024) == beyond(qwen, 16, 4096)  # equally many tokens
    capped = replace(qwen, attention_softcap=50.0)  # which the kernel has not
    scores = 16 * 2**16 * (512 - 128) * (4 + 4 + 2)  # of one block, which is larger in longer rows
    assert beyond(capped, 16, 4096) - beyond(capped, 64, 1024) == scores
    gemma = describe(ModelSourceConfig("google/gemma-3-270m"))
    assert "pallas in full_attention layers, xla (pallas has no sliding windows" in preflight.table(
        report("1xH100-80GB", gemma, row_length=1024)
    )


@pytest.mark.parametrize(
    ("source", "topology", "fit", "gigabytes"),
    [
        ("Qwen/Qwen3-0.6B", "1xH100-80GB", {"remat": "products", "rows": 8}, 16.69),
        ("Qwen/Qwen3-0.6B", "1xH100-80GB", {"remat": "none", "rows": 8}, 39.82),
        ("Qwen/Qwen3-1.7B", "1xH100-80GB", {"remat": "products", "rows": 4, "row_length": 4096}, 49.83),
        ("Qwen/Qwen3-1.7B", "4xA100-80GB", {"remat": "outputs", "rows": 16, "accumulation": 2}, 12.03),
        ("google/gemma-3-270m", "1xA10G-24GB", {"remat": "full", "rows": 4}, 5.96),
        ("meta-llama/Llama-3.2-1B", "1xH100-80GB", {"remat": "products", "rows": 4, "compute_dtype": "float32"}, 27.56),
    ],
)
def test_the_model_of_activations_is_near_what_a_gpu_compiler_says(
    source: str, topology: str, fit: dict[str, object], gigabytes: float
) -> None:
    """The figures, in 10⁹ bytes, are those of XLA in JAX 0.10.2, compiling these steps for such GPUs by CUDA 12."""
    settings = {"row_length": 1024, "compute_dtype": "bfloat16", **fit}
    found = report(topology, describe(ModelSourceConfig(source)), **settings)
    assert found.step.total / 1e9 == pytest.approx(gigabytes, rel=0.1)


@pytest.mark.parametrize(
    ("name", "devices", "accelerator"),
    [
        ("v5e-16", 16, "v5litepod-16"),
        ("v5p-8", 4, "v5p-8"),
        ("v6e-8", 8, "v6e-8"),
        ("2xA100-40GB", 2, ""),
        ("cpu-3", 3, ""),
    ],
)
def test_topologies(name: str, devices: int, accelerator: str) -> None:
    found = preflight.topology(name)
    assert (found.devices, found.accelerator) == (devices, accelerator)


@pytest.mark.parametrize("name", ["v5e", "v5e-3", "v5p-4", "h100", "0xH100-80GB", "cpu-0", "cpu"])
def test_an_unknown_topology_names_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match=f"--topology '?{name}.*(choose one of v5|8xH100-80GB)"):
        preflight.topology(name)


def test_what_does_not_go_together_is_refused_with_its_key() -> None:
    with pytest.raises(UsageError, match=r"fit\.mesh: .*does not make up the 8 devices"):
        report("8xH100-80GB", mesh=MeshConfig(3, 1, 1))
    with pytest.raises(UsageError, match=r"fit\.rows: 4 rows .* set rows to a multiple of 8"):
        report("8xH100-80GB", rows=4)
    with pytest.raises(UsageError, match=r"fit\.row_length: 2048 tokens, but a model has 1024 positions"):
        report("1xH100-80GB", row_length=2048)
    with pytest.raises(UsageError, match=r"fit\.freeze: no parameter is called 'head'"):
        report("1xH100-80GB", freeze=["head"])


def test_a_missing_tpu_compiler_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"v5e-8 needs the TPU compiler.*agentark-jax\[tpu\]"):
        report("v5e-8", rows=8)


def run(*arguments: str) -> int:
    return main(["fit", *arguments])


def test_the_table_of_a_recipe_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "qwen3_8b.yaml")
    assert run("--dry-run", "--topology", "8xH100-80GB", "--config", config) == 0
    out = capsys.readouterr().out
    for words in (
        "8 H100 GPUs of 80 GiB",
        "data 1 × fsdp 8 × tensor 1",
        "16 rows × 2048 tokens, bfloat16, remat full",
        "8,190,735,360, all trained",
        "GFLOP (trunk",
        "attention         pallas; on gpu, packed rows of 2048 in bfloat16",
        "11.45 GiB (parameters 3.82 GiB, optimizer 7.63 GiB), 91.5",
        "a model of the activations",
        "verdict           fits, with",
    ):
        assert words in out


def test_what_does_not_fit_says_what_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "llama3.1_8b.yaml")
    changes = ["--fit.mesh.data", "2", "--fit.remat", "none", "--fit.compute_dtype", "float32"]
    assert run("--dry-run", "--topology=4xA100-40GB", "--config", config, *changes) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert "does not fit in 36.00 GiB: try mesh.data: 1" in verdict
    for key in ("fit.remat: full", "fit.compute_dtype: bfloat16", "fit.accumulation: 4", "fit.row_length", "LoRA"):
        assert key in verdict
    assert run("--dry-run", "--topology", "1xA100-40GB", "--config", config, "--fit.freeze", "[embedding]") == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert "mesh.data" not in verdict
    assert "LoRA" not in verdict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "cpu-8"], "--topology is for --dry-run"),
        (["--dry-run"], "--topology is missing"),
        (["--dry-run", "--topology"], "expected one argument"),
        (["--dry-run", "--topology", "v7-8"], "'v7-8' is unknown; give a TPU slice"),
        (["--dry-run", "--topology", "cpu-8", "--fit.remta", "full"], "unknown key 'fit.remta'"),
    ],
)
def test_a_request_that_cannot_be_carried_out(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_the_cpu_compiler_counts_the_state_and_more() -> None:
    found = report("cpu-8", rows=8, row_length=64)
    assert found.fits
    assert found.state_bytes < found.step.total < found.state_bytes + 2**27
    assert "the CPU compiler" in preflight.table(found)


has_libtpu = importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ
needs_libtpu = pytest.mark.skipif(not has_libtpu, reason="libtpu is not installed: pip install 'agentark-jax[tpu]'")


@pytest.mark.tpu_compile
@needs_libtpu
@pytest.mark.parametrize("source", FAMILIES)
def test_the_step_of_every_family_compiles_for_a_tpu(source: str) -> None:
    settings = {"rows": 8, "row_length": 128, "compute_dtype": "bfloat16", "remat": "outputs", "accumulation": 2}
    found = report("v5e-8", tiny(source), mesh=MeshConfig(1, 4, 2), **settings)
    assert found.fits
    assert found.step.total > found.state_bytes


@pytest.mark.tpu_compile
@needs_libtpu
def test_a_step_that_the_tpu_compiler_refuses_for_its_memory_does_not_fit() -> None:
    found = report("v5e-4", tiny("Qwen/Qwen3-0.6B"), rows=64, row_length=8192, remat="none")
    assert not found.fits
    assert found.step.total > found.topology.memory
    assert "fit.remat: full" in preflight.table(found)


def test_adapters_alone_need_little_state() -> None:
    full = report("8xH100-80GB", describe(ModelSourceConfig("Qwen/Qwen3-8B")), rows=8)
    adapted = report("8xH100-80GB", describe(ModelSourceConfig("Qwen/Qwen3-8B")), rows=8, lora=Lora(rank=8, alpha=16))
    layer = (4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096) + 3 * (4096 + 12288)
    assert adapted.trainable == 36 * 8 * layer
    assert adapted.parameters == full.parameters + adapted.trainable
    assert adapted.optimizer_bytes < full.optimizer_bytes / 20
    assert adapted.step.total < 0.6 * full.step.total
