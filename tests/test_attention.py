"""Attention backends against the dense computation, on one device and on eight; what is chosen where, and why."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mesh
import test_training as t
from test_preflight import FAMILIES, needs_libtpu

from agentark_jax.models import attention, blocked
from agentark_jax.models.attention import (
    XLA,
    AttentionPlan,
    choose_attention,
    dense,
    kernel_platform,
    whole_sequences,
)
from agentark_jax.models.transformer import hidden_states

PALLAS = AttentionPlan("pallas", "xla", interpret=True)
SPLASH = AttentionPlan("splash", "splash", interpret=True)
CUDNN = AttentionPlan("cudnn", "cudnn")
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def segments(length):
    """Two rows: two segments and padding; three segments, a short one between, of which none ends with a block."""
    rows = np.zeros((2, length), np.int32)
    for row, ends in enumerate([(length // 3, length - 20), (length // 2 + 5, length // 2 + 15, length)]):
        for segment, (start, end) in enumerate(zip((0, *ends), ends, strict=False), start=1):
            rows[row, start:end] = segment
    return rows


def outputs_and_gradients(plan, length, *, heads, kv_heads, head_dim=32, window=None, softcap=None, packed=True, dtype):
    """[mixed values, gradients of queries, keys and values], those of padding included, with a scale of 0.3."""
    config = replace(t.MIXED, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, sliding_window=window or 1)
    layer_type = "full_attention" if window is None else "sliding_attention"
    attend = whole_sequences(config, length, segments(length) if packed else None, plan)[layer_type]
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, head_dim), (2, kv_heads, length, head_dim), (2, kv_heads, length, head_dim)]
    query, key, value = (jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in shapes)
    direction = rng.normal(size=query.shape)

    def loss(*arrays):
        mixed = attend(*arrays, 0.3, softcap)
        return (mixed * direction).sum(), mixed

    gradients, mixed = quick_jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
    return [np.asarray(array, np.float32) for array in (mixed, *gradients)]


def assert_equals_dense(plan, length, tolerance=1e-5, dtype=jnp.float32, **settings):
    """Both in `dtype`; the kernel may be as far from the exact result as the tolerance says."""
    exact = outputs_and_gradients(XLA, length, dtype=jnp.float32, **settings)
    for found, expected in zip(outputs_and_gradients(plan, length, dtype=dtype, **settings), exact, strict=True):
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {"heads": 6, "kv_heads": 2},
        {"heads": 3, "kv_heads": 1, "softcap": 5.0},
        {"heads": 6, "kv_heads": 2, "window": 70},
        {"heads": 2, "kv_heads": 2, "window": 150, "softcap": 5.0, "packed": False},
    ],
    ids=["packed, groups of three", "soft cap", "window in a block", "window over blocks, unpacked"],
)
def test_blocks_of_queries_equal_all_scores_at_once(settings, dtype, monkeypatch):
    """Three blocks, the last one short; values, and gradients, which here are written by hand."""
    length = 2 * blocked._BLOCK + 50
    found = outputs_and_gradients(XLA, length, dtype=dtype, **settings)

    def at_once(segment_ids, window, query, key, value, scale, softcap):
        everything = slice(0, length)
        mask = blocked.causal_mask(everything, everything, segment_ids, window)
        return dense(query, key, value, scale, softcap, mask=mask)

    monkeypatch.setattr(attention, "blocked", at_once)
    exact = outputs_and_gradients(XLA, length, dtype=jnp.float32, **settings)
    tolerance = 2e-6 if dtype == jnp.float32 else 0.03
    for each, expected in zip(found, exact, strict=True):
        np.testing.assert_allclose(each, expected, atol=tolerance * np.abs(expected).max())


def test_long_rows_have_few_blocks_and_blocks_see_only_what_their_windows_reach():
    assert list(blocked._blocks(300, None)) == [
        (slice(0, 128), slice(0, 128)),
        (slice(128, 256), slice(0, 256)),
        (slice(256, 300), slice(0, 300)),
    ]
    assert [keys for _, keys in blocked._blocks(300, 101)] == [slice(0, 128), slice(28, 256), slice(156, 300)]
    long = [queries for queries, _ in blocked._blocks(16_000, 512)]
    assert len(long) == 8
    assert long[-1].stop == 16_000


@pytest.mark.parametrize(
    "settings",
    [
        {"heads": 6, "kv_heads": 2},
        {"heads": 3, "kv_heads": 3, "packed": False},
        {"heads": 3, "kv_heads": 1, "window": 96},  # as long as a row: no window
    ],
    ids=["packed, groups of three", "unpacked", "wide window"],
)
def test_pallas_equals_dense(settings):
    plan = AttentionPlan("pallas", "pallas", interpret=True)
    assert_equals_dense(plan, 96, **settings)  # three blocks of 32


@pytest.mark.parametrize(
    "settings",
    [
        {"heads": 6, "kv_heads": 2, "window": 100},
        {"heads": 3, "kv_heads": 1, "softcap": 5.0},
        {"heads": 3, "kv_heads": 3, "window": 130, "packed": False},
    ],
    ids=["packed, window, groups of three", "packed, soft cap", "unpacked, window over blocks"],
)
def test_splash_equals_dense(settings):
    assert_equals_dense(SPLASH, 384, **settings)  # three blocks of 128


def test_in_bfloat16_roundings_do_not_tilt_the_result():
    """A scale rounded to 0.3008 would make all scores, and the gradients of queries, larger by the same 0.26 %."""
    settings = {"heads": 2, "kv_heads": 1}
    assert_equals_dense(SPLASH, 128, tolerance=0.03, dtype=jnp.bfloat16, **settings)
    found, exact = (
        outputs_and_gradients(plan, 128, dtype=dtype, **settings)[1]
        for plan, dtype in ((SPLASH, jnp.bfloat16), (XLA, jnp.float32))
    )
    assert (found * exact).sum() / (exact**2).sum() == pytest.approx(1, abs=1.5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cudnn_equals_dense(window, head_dim):
    settings = {"heads": 6, "kv_heads": 2, "head_dim": head_dim, "window": window, "packed": False}
    assert_equals_dense(CUDNN, 250, tolerance=0.03, dtype=jnp.bfloat16, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_pallas_equals_dense_where_it_is_compiled(head_dim, dtype):
    settings = {"heads": 6, "kv_heads": 2, "head_dim": head_dim}
    assert_equals_dense(replace(PALLAS, interpret=False), 384, tolerance=0.03, dtype=dtype, **settings)


@functools.cache
def model_gradient(plan, length, remat):
    """(function, its arguments): the gradient of a model with both types of layers on packed rows."""
    model = replace(t.MIXED, head_dim=16, layer_types=("sliding_attention", "full_attention"))
    rows = segments(length)
    ids = np.random.default_rng(0).integers(1, model.vocab_size, rows.shape)
    positions = np.tile(np.arange(length), (2, 1))  # of no consequence here

    def loss(params):
        hidden = hidden_states(model, params, ids, positions, rows, remat, attention=plan)
        return jnp.sum(jnp.where(rows[..., None] > 0, hidden, 0) ** 2 * np.arange(1, 17))

    return jax.grad(loss), t.make_params(model)


@pytest.mark.parametrize(("plan", "length"), [(PALLAS, 48), (SPLASH, 128)], ids=["pallas", "splash"])
def test_a_model_has_the_gradient_that_it_has_with_dense_attention(plan, length):
    kernels, dense = model_gradient(plan, length, "products"), model_gradient(XLA, length, "products")
    found, expected = (quick_jit(function)(params) for function, params in (kernels, dense))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert largest > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest, rtol=1e-4), found, expected)


def forward_kernels(jaxpr):
    """How often a program runs a forward kernel."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            count += "forward" in str(equation.params["name"])
            continue
        for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
            inner = getattr(leaf, "jaxpr", leaf)
            count += forward_kernels(inner) if hasattr(inner, "eqns") else 0
    return count


@pytest.mark.parametrize(("remat", "runs"), [("none", 1), ("products", 1), ("outputs", 2), ("full", 2)])
def test_the_backward_pass_runs_a_kernel_again_only_where_it_keeps_less_than_products(remat, runs):
    function, params = model_gradient(PALLAS, 48, remat)
    assert forward_kernels(jax.make_jaxpr(function)(params).jaxpr) == runs  # in the only layer with full attention


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """What eight virtual devices computed."""
    directory = tmp_path_factory.mktemp("eight")
    test_mesh.finish(test_mesh.start(8, directory / "compiled", "attention", directory))
    return directory


@pytest.mark.parametrize("kv_heads", [2, 3])  # divided over two devices, and whole on each of them
def test_kernels_on_eight_devices_equal_dense_attention_on_one(eight, kv_heads):
    found = np.load(eight / f"kernel_{kv_heads}.npz")
    for name, expected in test_mesh.worker.attend(XLA, (1, 1, 1), kv_heads).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_steps_with_kernels_on_eight_devices_equal_those_with_dense_attention_on_one(eight):
    test_mesh.assert_same_steps(np.load(eight / "steps.npz"), dict(np.load(eight / "steps_one.npz")))


def chosen(platform, *, packed=True, length=1024, dtype="bfloat16", **changes):
    model = replace(t.MIXED, **{"head_dim": 64, "sliding_window": 512, **changes})
    plan, why = choose_attention(platform, model, packed=packed, length=length, dtype=dtype)
    return (plan.full_attention, plan.sliding_attention), why


@pytest.mark.parametrize(
    ("platform", "settings", "plan", "words"),
    [
        ("cpu", {}, ("xla", "xla"), "xla; there are no kernels for cpu"),
        ("Radeon", {}, ("xla", "xla"), "no kernels for Radeon"),
        ("tpu", {}, ("splash", "splash"), "splash; on tpu, packed rows of 1024 in bfloat16"),
        ("tpu", {"dtype": "float32", "attention_softcap": 5.0}, ("splash", "splash"), "in float32"),
        ("tpu", {"length": 200}, ("xla", "xla"), "xla (splash needs rows of a multiple of 128)"),
        ("gpu", {}, ("pallas", "xla"), "pallas in full_attention layers, xla (pallas has no sliding windows, and 512"),
        ("gpu", {"length": 512}, ("pallas", "pallas"), "pallas; on gpu, packed rows of 512"),
        ("gpu", {"layer_types": ("full_attention",)}, ("pallas", "xla"), "pallas; on gpu, packed rows of 1024"),
        ("gpu", {"length": 1000}, ("xla", "xla"), "pallas needs rows of a multiple of 16"),
        ("gpu", {"head_dim": 96}, ("xla", "xla"), "pallas has no heads of 96"),
        ("gpu", {"attention_softcap": 5.0}, ("xla", "xla"), "xla (pallas has no soft cap)"),
        ("gpu", {"packed": False}, ("cudnn", "cudnn"), "cudnn; on gpu, rows of 1024 in bfloat16"),
        ("gpu", {"packed": False, "length": 77}, ("cudnn", "cudnn"), "cudnn; on gpu, rows of 77"),
        (
            "gpu",
            {"packed": False, "dtype": "float32"},
            ("pallas", "xla"),
            "pallas (cudnn computes in 16 bits only) in full_attention layers, xla (cudnn computes in 16 bits only; "
            "pallas has no sliding windows",
        ),
        ("gpu", {"packed": False, "head_dim": 256, "length": 512}, ("pallas", "pallas"), "cudnn has no heads of 256"),
        ("gpu", {"packed": False, "attention_softcap": 5.0}, ("xla", "xla"), "cudnn has no soft cap; pallas has no"),
    ],
)
def test_what_is_chosen_and_why(platform, settings, plan, words):
    found, why = chosen(platform, **settings)
    assert found == plan
    assert words in why
    assert "\n" not in why


def test_kernels_are_for_tpus_and_for_gpus_that_have_them():
    def platform(**device):
        return kernel_platform(SimpleNamespace(**device))

    assert platform(platform="tpu") == "tpu"
    assert platform(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0") == "gpu"
    assert platform(platform="gpu", device_kind="Tesla T4", compute_capability="7.5") == "Tesla T4"
    assert platform(platform="gpu", device_kind="AMD Instinct MI300X", compute_capability="gfx942").startswith("AMD")


@pytest.mark.tpu_compile
@needs_libtpu
@pytest.mark.parametrize("source", FAMILIES)
def test_the_tpu_program_of_every_family_runs_every_kernel_once(source):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(Path(__file__).with_name("tpu_worker.py")), source]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # Once forward and once for each of the two gradients in every layer of the program: nothing is run twice.
    for phase in ("fwd", "dq", "dkv"):
        assert found["kernels"].get(phase) == found["layers"], found
