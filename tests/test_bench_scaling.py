"""What compiled programs exchange, theory and growth, against counts by hand."""

import asyncio
import json
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
from chat_families import write_family
from test_benchmarks import CONFIG as GEMMA
from test_benchmarks import VOCABULARY

from agentark_jax.data.chat import make_format
from agentark_jax.data.config import PromptConfig
from agentark_jax.engines.base import Request
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.config import ModelConfig, load_config
from agentark_jax.models.flops import head_params, matmul_params
from agentark_jax.models.transformer import param_shapes
from agentark_jax.objectives import chunked
from agentark_jax.protocols.config import DebateConfig
from agentark_jax.records import Completion, Sampling
from agentark_jax.training.config import FitConfig, MeshConfig
from benchmarks import growth, growth_side, results, scaling, tpu_side
from benchmarks.collectives import Collective, Program, array_bytes, group_size
from benchmarks.workers import Side, Worker

PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %added = f32[]{:T(128)} add(%a, %b)
}

%started (p: bf16[8,16]) -> bf16[64,16] {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag.1 = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%finished (p.1: bf16[8,16]) -> bf16[64,16] {
  %p.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag.2 = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%windowed_dot_general_body_ag (state: (bf16[4,2], u32[], u32[])) -> (bf16[4,2], u32[], u32[]) {
  %state = (bf16[4,2]{1,0:T(8,128)}, u32[]{:T(128)}, /*index=2*/u32[]{:T(128)}) parameter(0)
  %part = bf16[4,2]{1,0:T(8,128)} get-tuple-element(%state), index=0
  %i = u32[]{:T(128)} get-tuple-element(%state), index=1
  %two = u32[]{:T(128)} get-tuple-element(%state), index=2
  %go = (bf16[4,2]{1,0:T(8,128)S(1)}, bf16[4,2]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%part), channel_id=4, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}, metadata={op_name="dot"}
  %gone = bf16[4,2]{1,0:T(8,128)} collective-permute-done(%go), metadata={op_name="dot"}
  %more = bf16[64,16]{1,0:T(8,128)} fusion(%part), kind=kLoop, calls=%finished
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %state.1 = (bf16[4,2]{1,0:T(8,128)}, u32[]{:T(128)}, /*index=2*/u32[]{:T(128)}) tuple(%gone, %next, %two)
}

%window_condition (state.2: (bf16[4,2], u32[], u32[])) -> pred[] {
  %five = u32[]{:T(128)} constant(5)
  %state.2 = (bf16[4,2]{1,0:T(8,128)}, u32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%state.2), index=1
  ROOT %less = pred[]{:T(512)} compare(%i.1, %five), direction=LT
}

%layers (carry: (s32[], bf16[4,2], s32[], u32[])) -> (s32[], bf16[4,2], s32[], u32[]) {
  %carry = (s32[]{:T(128)}, bf16[4,2]{1,0:T(8,128)}, s32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %layer = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[4,2]{1,0:T(8,128)} get-tuple-element(%carry), index=1
  %bound = s32[]{:T(128)} get-tuple-element(%carry), index=2
  %stride = u32[]{:T(128)} get-tuple-element(%carry), index=3
  %zero.1 = u32[]{:T(128)} constant(0)
  %one.1 = s32[]{:T(128)} constant(1)
  %began = bf16[64,16]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%started
  %ready = (bf16[4,2]{1,0:T(8,128)}, u32[]{:T(128)}, u32[]{:T(128)}) tuple(%x, %zero.1, %stride)
  %ring = (bf16[4,2]{1,0:T(8,128)}, u32[]{:T(128)}, u32[]{:T(128)}) while(%ready), condition=%window_condition, \
body=%windowed_dot_general_body_ag, metadata={op_name="dot"}
  %y = bf16[4,2]{1,0:T(8,128)} get-tuple-element(%ring), index=0
  %last = bf16[4,2]{1,0:T(8,128)S(1)} collective-permute(%y), channel_id=5, \
source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}, metadata={op_name="dot"}
  %layer.1 = s32[]{:T(128)} add(%layer, %one.1)
  ROOT %carry.1 = (s32[]{:T(128)}, bf16[4,2]{1,0:T(8,128)}, s32[]{:T(128)}, u32[]{:T(128)}) \
tuple(%layer.1, %last, %bound, %stride)
}

%layers_condition (carry.2: (s32[], bf16[4,2], s32[], u32[])) -> pred[] {
  %carry.2 = (s32[]{:T(128)}, bf16[4,2]{1,0:T(8,128)}, s32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %layer.2 = s32[]{:T(128)} get-tuple-element(%carry.2), index=0
  %bound.2 = s32[]{:T(128)} get-tuple-element(%carry.2), index=2
  ROOT %less.1 = pred[]{:T(512)} compare(%layer.2, %bound.2), direction=LT
}

ENTRY %main (w: bf16[4,2], g: f32[32,8]) -> f32[32,8] {
  %w = bf16[4,2]{1,0:T(8,128)} parameter(0)
  %g = f32[32,8]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %seven = s32[]{:T(128)} constant(7)
  %seven.1 = s32[]{:T(128)} copy(%seven)
  %stride.1 = u32[]{:T(128)} constant(2)
  %begin = (s32[]{:T(128)}, bf16[4,2]{1,0:T(8,128)}, s32[]{:T(128)}, u32[]{:T(128)}) \
tuple(%zero, %w, %seven.1, %stride.1)
  %scan = (s32[]{:T(128)}, bf16[4,2]{1,0:T(8,128)}, s32[]{:T(128)}, u32[]{:T(128)}) while(%begin), \
condition=%layers_condition, body=%layers
  %norms = (f32[16]{0}, f32[]{:T(128)}) all-reduce(%g, %g), channel_id=1, \
replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%sum
  %part.1 = f32[4,8]{1,0:T(8,128)} reduce-scatter(%g), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %all = f32[32,8]{1,0:T(8,128)} all-to-all(%g), channel_id=3, replica_groups={{0,1},{2,3},{4,5},{6,7}}
}
"""


def found(text: str = PROGRAM) -> dict[str, Collective]:
    return {f"{one.kind} {one.channel}": one for one in Program(text).collectives}


def test_every_kind_of_exchange_counts_what_a_device_sends() -> None:
    one = found()
    assert one["all-reduce 1"].bytes == 2 * 3 / 4 * 17 * 4  # 16 numbers and one, in groups of 4
    assert one["reduce-scatter 2"].bytes == 7 / 8 * 8 * (4 * 8 * 4)
    assert one["all-to-all 3"].bytes == 1 / 2 * 32 * 8 * 4
    assert one["collective-permute 4"].bytes == 4 * 2 * 2 / 2  # half of the devices send
    assert one["collective-permute 5"].bytes == 4 * 2 * 2
    assert [one[name].group for name in ("all-reduce 1", "reduce-scatter 2", "all-to-all 3")] == [4, 8, 2]


def test_loops_multiply_and_of_the_copies_of_a_spread_exchange_one_counts() -> None:
    one = found()
    assert one["collective-permute 4"].times == 7 * 3  # 0, 2 and 4 are less than 5
    assert one["collective-permute 5"].times == 7
    assert one["all-gather 7"].times == 7  # its copy in the inner loop is no exchange of its own
    assert one["all-gather 7"].total == 7 * 7 / 8 * 64 * 16 * 2
    assert len(Program(PROGRAM).collectives) == len(one) == 6


def test_what_the_text_says_of_a_loop_needs_no_counter() -> None:
    unknown = PROGRAM.replace("add(%layer, %one.1)", "multiply(%layer, %one.1)")
    says = 'body=%layers, backend_config={"known_trip_count":{"n":"6"},"known_init_step":{"init":"0","step":"1"}}'
    assert found(unknown.replace("body=%layers", says, 1))["collective-permute 5"].times == 6


def test_a_bound_that_devices_compute_is_given() -> None:
    computed = PROGRAM.replace("%seven = s32[]{:T(128)} constant(7)", "%seven = s32[]{:T(128)} floor(%zero)")
    counted = {one.channel: one.times for one in Program(computed, dynamic=9).collectives}
    assert counted["5"] == 9  # the layers' loop alone
    assert counted["4"] == 9 * 3


def test_the_loss_of_a_device_has_chunks() -> None:
    case = scaling.Case(scaling.SMALL, "v5e-8", tensor=2)
    rows = chunked.chunk_rows(2559, 151936 // 2, chunked.portions("tpu").chunk_bytes)
    assert 1 < tpu_side.loss_chunks(case.model, case.fit, 8) == -(-2559 // rows)


def test_a_ring_is_known_by_its_loop_and_what_stands_beside_it_by_the_same_shape() -> None:
    one = found()
    assert [one[name].ring for name in ("collective-permute 4", "collective-permute 5")] == ["all-gather"] * 2
    assert {each.ring for name, each in one.items() if "permute" not in name} == {""}


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(AgentArkError, match="scan: how often this loop runs cannot be told"):
        found(PROGRAM.replace("%seven = s32[]{:T(128)} constant(7)", "%seven = s32[]{:T(128)} floor(%zero)"))
    with pytest.raises(AgentArkError, match=r"scan: how often this loop runs .*its counter is made by multiply"):
        found(PROGRAM.replace("add(%layer, %one.1)", "multiply(%layer, %one.1)"))
    with pytest.raises(AgentArkError, match="without groups"):
        found(PROGRAM.replace("replica_groups={{0,1,2,3,4,5,6,7}}, ", ""))
    with pytest.raises(AgentArkError, match="without an entry"):
        Program("HloModule nothing")


def test_sizes_of_arrays_and_groups() -> None:
    assert (
        array_bytes("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0}, pred[5], s8[3,1], f8e4m3fn[7], u32[])")
        == 24 + 8 + 5 + 3 + 7 + 4
    )
    assert group_size("replica_groups=[16,4]<=[4,16]T(1,0), x", 64) == 4
    assert group_size("replica_groups=mesh['x'=8,'y'=2,'z'=4] {'x','z'}, x", 64) == 32
    assert group_size("replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x','y'}, x", 8) == 8
    assert group_size("replica_groups=mesh['x'=8,'y'=2] {'x':(2)4,'y'}, x", 16) == 8
    assert group_size("replica_groups={}, x", 64) == 64


FIT = FitConfig(rows=4, row_length=512, compute_dtype="bfloat16", remat="full")
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


def test_theory_of_a_mesh_by_hand() -> None:
    layers, head = matmul_params(GEMMA) / 2, head_params(GEMMA) / 2
    one = 512 * GEMMA.hidden_size  # a row of 512 tokens per device of data and fsdp
    wanted = {
        "weights": (2 * layers + head) * 2 / 2,
        "gradients": (layers * 2 + head * 4) / 2 + 2 * (layers * 2 + head * 4) / 2 / 2,
        "activations": one * 2 * 2 / 2 + one * 2 / 2 * (2 * (5 * 3 + 1) + 4),
    }
    assert scaling.theory(GEMMA, FIT, SIZES) == pytest.approx({**wanted, "total": sum(wanted.values())})
    none = scaling.theory(GEMMA, FIT, dict.fromkeys(SIZES, 1))
    assert set(none.values()) == {0.0}
    kept = scaling.theory(GEMMA, replace(FIT, remat="products"), SIZES)
    assert wanted["activations"] - kept["activations"] == one * 2 / 2 * 2 * 3  # a sum less in each of 3 layers
    untied = scaling.theory(replace(GEMMA, tie_embeddings=False), FIT, SIZES)
    assert untied["gradients"] - wanted["gradients"] == pytest.approx(2 * head * 4 / 2 / 2)  # over data alone


def exchange(kind: str, shape: str, count: float = 1e6, where: str = "", group: int = 4, ring: str = "") -> Collective:
    return Collective(kind, shape, group, count, "1", where, ring=ring)


PURPOSES = {
    "weights": [
        exchange("collective-permute", "bf16[40,1,12]"),
        exchange("all-gather", "bf16[40,24]"),
        exchange("collective-permute", "bf16[40,1,12]", ring="all-gather"),
    ],
    "gradients": [
        exchange("collective-permute", "bf16[40,12]"),
        exchange("reduce-scatter", "f32[48,12]", where="shard_map/reduce_scatter"),
        exchange("all-reduce", "(f32[24], f32[24])"),
        exchange("collective-permute", "bf16[40,12]", ring="reduce-scatter"),
    ],
    "activations": [
        exchange("all-reduce", "bf16[1,512,24]"),
        exchange("all-to-all", "bf16[4,512,6]", where="shard_map/all_to_all"),
        exchange("all-gather", "s32[4,1,512]"),
        exchange("all-reduce", "f32[37,24]", where="jvp/shard_map/while/psum"),
    ],
}


@pytest.mark.parametrize("purpose", PURPOSES)
def test_an_exchange_is_told_by_its_shape_and_kind(purpose: str) -> None:
    for one in PURPOSES[purpose]:
        assert scaling.purpose(one, GEMMA, FIT, 2) == purpose, one
    counted = scaling.by_purpose([one for ones in PURPOSES.values() for one in ones], GEMMA, FIT, 2)
    assert counted == {"weights": 3e6, "gradients": 4e6, "activations": 4e6, "total": 11e6}


def test_surplus_is_named() -> None:
    least = scaling.theory(GEMMA, FIT, SIZES)["weights"]
    named = scaling.surplus(
        [
            exchange("all-gather", "f32[40,24]", least + 1.3e6),
            exchange("all-reduce", f"f32[{VOCABULARY // 2},24]", 8e5),
            exchange("all-reduce", "f32[40,12]", 9e5, group=2),  # over data alone, where there is no other way
            exchange("all-gather", "bf16[4,512,24]", 1e5),
            exchange("all-gather", "s32[4,512]", 5e5),  # token ids have to travel
        ],
        GEMMA,
        FIT,
        SIZES,
    )
    # More of the weights than theory has, half of what float32 adds to that, half of the all-reduce and what is left of
    # the gradients, all activations.
    rest = 8e5 + 9e5 - 4e5 - scaling.theory(GEMMA, FIT, SIZES)["gradients"]
    wanted = {
        "weights sent beyond": 1.3e6,
        "gradients sent beyond": rest,
        "weights gathered in float32": (least + 1.3e6) / 2,
        "all-reduced": 4e5,
        "activations": 1e5,
    }
    for (what, count), (words, bytes) in zip(named, sorted(wanted.items(), key=lambda each: -each[1]), strict=True):
        assert words in what
        assert count == pytest.approx(bytes)


def test_a_result_says_how_far_from_theory_the_program_is() -> None:
    case = scaling.Case("Qwen/Qwen3-0.6B", "v5e-8")
    least = scaling.theory(case.model, case.fit, case.mesh.sizes(8))
    sent = [exchange("all-gather", "bf16[3072,1024]", 1.5 * least["weights"], group=8)]
    reply = {"collectives": [asdict(one) for one in sent], "seconds": 60.0, "temporary_bytes": 2e9}
    made = scaling.result(case, reply, True, results.environment())
    assert made.benchmark == "scaling.0_6b_v5e-8_fsdp8"
    ratio = {each.of: each.value.median for each in made.ratios}
    assert ratio["weights"] == pytest.approx(1.5)
    assert ratio["total"] == pytest.approx(1.5 * least["weights"] / least["total"])
    assert [check.value for check in made.checks] == [pytest.approx(0.5 * least["weights"] / 1e9)]
    shown = results.table(results.Comparison.from_json(made.to_json(), "here"))
    assert "**1.50×** (1.50 – 1.50) of theory, weights" in shown
    assert "bfloat16; devices 8, data 1, fsdp 8" in shown


def test_cases_are_told_apart_and_rows_are_as_long_as_nothing_else() -> None:
    names = [case.name for case in scaling.CASES]
    assert len(set(names)) == len(names)
    for case in scaling.CASES:
        assert case.fit.rows * case.tensor == int(np.prod(list(case.mesh.sizes(case.fit.rows * case.tensor).values())))
        assert case.model.num_layers
    for length in (1024, 3072, 1024 // 8):
        with pytest.raises(
            UsageError, match=rf"rows of {length} are as long as parameters of Qwen/Qwen3-0\.6B are wide"
        ):
            _ = replace(scaling.CASES[0], row_length=length).model


def test_exponents_are_slopes_of_logarithms() -> None:
    assert growth.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert growth.exponent([10, 100], [5, 5]) == pytest.approx(0)


def test_flops_of_a_made_up_step_grow_with_context_and_vocabulary() -> None:
    sizes = growth.Sizes(hidden=64, layers=2)
    head = 6 * 64 * 128 * 4 / 2
    per_entry = growth.step_flops(growth.shape(sizes, 1001), 4, 128) - growth.step_flops(
        growth.shape(sizes, 1000), 4, 128
    )
    assert per_entry == head
    short, long = (growth.step_flops(growth.shape(sizes, 1000), 1, length) for length in (2048, 4096))
    assert 2 < long / short < 4


@pytest.fixture(scope="module")
def form(tmp_path_factory):
    return make_format(write_family("qwen3", tmp_path_factory.mktemp("family") / "qwen3"), PromptConfig())


def test_debates_are_counted(form) -> None:
    """5 agents, 3 rounds, 2 questions: a call each; what leads a prompt is shared."""
    config = DebateConfig(agents=5, rounds=3, max_tokens=6)
    counted = {
        layout: growth.count(form, replace(config, layout=layout), 2) for layout in ("own_first", "shared_first")
    }
    assert [each["calls"] for each in counted.values()] == [5 * 3 * 2] * 2
    for each in counted.values():
        assert each["calls"] <= each["new prompt tokens"] < each["prompt tokens"]
    assert counted["shared_first"]["new prompt tokens"] < counted["own_first"]["new prompt tokens"]
    alone = growth.count(form, replace(config, rounds=1), 2)
    assert alone["prompt tokens"] % 5 == 0
    # The first agent's prompt is new (but for what the questions share), the others' last tokens.
    assert alone["new prompt tokens"] <= alone["prompt tokens"] // 5 + 2 * 4


def test_a_prefix_cache_that_never_forgets(form) -> None:
    engine = growth.CountingEngine(form, 2)
    sampling = Sampling(temperature=1.0, max_tokens=2, stop_ids=(), seed=3)

    def ask(*ids: int) -> Completion:
        return asyncio.run(engine.generate(Request(np.asarray(ids, np.int32), sampling)))

    assert ask(1, 2, 3).cached_tokens == 0
    assert ask(1, 2, 4).cached_tokens == 2
    assert ask(1, 2, 4).cached_tokens == 2  # the last token's scores are not kept
    said = ask(5).ids.tolist()
    assert ask(5, *said, 6).cached_tokens == 3  # answers are
    assert (engine.calls, engine.prompt_tokens, engine.new_tokens) == (5, 14, 3 + 1 + 1 + 1 + 1)


def test_a_step_of_one_process_sends_nothing() -> None:
    config = growth.shape(growth.Sizes(hidden=64, layers=1, contexts=(16,), length=16), 64)
    step = growth_side.training({"config": config, "rows": 2, "length": 16})
    first, second = step(0), step(1)
    assert first["sent_bytes"] == 0
    assert second["sent_bytes"] is None
    assert first["seconds"] > 0
    assert first["loss"] == pytest.approx(np.log(64), rel=0.05)  # a new model knows nothing


@pytest.mark.slow
def test_one_process_and_two_have_the_same_loss_and_two_send_their_gradients() -> None:
    sizes = growth.Sizes(hidden=64, layers=1, contexts=(32,), rows=2, length=32, repetitions=1)
    made = growth.of_processes(sizes, True, lambda message: None)
    value = {entry.name: entry.value.median for entry in made.measured}
    assert value["one core, sent"] == value["one process, two cores, sent"] == 0
    model = ModelConfig.from_hf(growth.shape(sizes, growth.PROCESS_VOCABULARY), "test")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model)))
    assert value["two processes, data, sent"] >= 2 / 2 * parameters * 4 / 1e6  # an all-reduce among two
    assert {ratio.of for ratio in made.ratios} == {"one core", "two processes, data", "two processes, fsdp"}


@pytest.mark.tpu_compile
def test_a_step_compiled_for_eight_tpus_sends_at_least_what_theory_asks_for(tmp_path) -> None:
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'agentark-jax[tpu]'")
    raw = growth.shape(growth.Sizes(hidden=256, layers=3, contexts=(640,), length=640), 1024)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    mesh = MeshConfig(1, 4, 2)
    fit = FitConfig(rows=4, row_length=640, compute_dtype="bfloat16", remat="full", mesh=mesh)
    setup = {"source": str(tmp_path), "topology": "v5e-8", "fit": asdict(fit)}
    with Worker(Side("tiny", "benchmarks.tpu_side", setup)) as worker:
        reply = worker.repeat(0)
    assert reply["devices"] == 8
    sent = scaling.by_purpose([Collective(**one) for one in reply["collectives"]], load_config(tmp_path), fit, 2)
    least = scaling.theory(load_config(tmp_path), fit, mesh.sizes(8))
    for purpose, count in sent.items():
        assert 0.95 * least[purpose] < count < 3 * least[purpose], purpose
