"""The embedded engine: exact log-probabilities, independence of slot and neighbours, seeds, limits."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_models import our_logits

from agentark_jax.engines import local
from agentark_jax.engines.base import Request
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.local import LocalEngine, decoder
from agentark_jax.engines.sampling import sample
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models import transformer
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.source import ScratchConfig
from agentark_jax.objectives.chunked import chunked_logprobs
from agentark_jax.records import Sampling

VOCABULARY, EOS = 517, 1  # no multiple of the sampler's block
CONFIG = ModelConfig.from_hf(
    ScratchConfig(hidden_size=48, layers=2, head_dim=12, intermediate_size=64).to_hf(
        vocabulary=VOCABULARY, bos_id=2, eos_id=EOS
    ),
    "test",
)
PARAMS = transformer.init_params(CONFIG, 0)
# Windows shorter than most prompts, and than what is decoded after them.
WINDOWED = replace(CONFIG, layer_types=("sliding_attention", "full_attention"), sliding_window=11)
WINDOWED_PARAMS = transformer.init_params(replace(WINDOWED, initializer_range=0.15), 0)
TOKENIZER = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))


def make_engine(model=CONFIG, params=PARAMS, context=96, **settings) -> LocalEngine:
    config = EngineConfig(**{"slots": 4, "chunk": 8, "prompt_bucket": 32, **settings})
    return LocalEngine(config, model, params, TOKENIZER, context=context, model="model", weights="weights")


def requests(count: int, **sampling) -> list[Request]:
    random = np.random.default_rng(0)
    return [
        Request(
            random.integers(3, VOCABULARY, random.integers(1, 60)).astype(np.int32),
            Sampling(**{"temperature": 0.9, "max_tokens": 20, "stop_ids": (EOS,), "seed": 2**40 + seed, **sampling}),
        )
        for seed in range(count)
    ]


def sharing(**sampling) -> list[Request]:
    """Prompts in groups with a beginning of their own; both parts of many lengths, up to the context."""
    random = np.random.default_rng(1)
    sampling = {"temperature": 0.9, "max_tokens": 12, "stop_ids": (EOS,), **sampling}
    asked = []
    for shared, rests in ((1, (1, 40)), (31, (1, 2, 33)), (32, (20,)), (33, (1, 2, 13, 14, 34, 50)), (64, (2, 19))):
        beginning = random.integers(3, VOCABULARY, shared)
        for rest in rests:
            ids = np.concatenate([beginning, random.integers(3, VOCABULARY, rest)]).astype(np.int32)
            asked.append(Request(ids, Sampling(seed=len(asked), **sampling), shared))
    return asked


def generate(engine: LocalEngine, asked: list[Request]):
    async def everyone():
        return await asyncio.gather(*(engine.generate(request) for request in asked))

    return asyncio.run(everyone())


def trainer_logprobs(request: Request, completion, temperature: float, config=CONFIG, params=PARAMS) -> np.ndarray:
    ids = np.concatenate([request.prompt_ids, completion.ids])[None]
    hidden = transformer.hidden_states(config, params, ids, np.arange(ids.shape[1])[None], None)
    completed = np.arange(1, ids.shape[1]) >= len(request.prompt_ids)
    head = transformer.unembedding(config, params)
    scores = chunked_logprobs(hidden[0, :-1], head, ids[0, 1:], completed, temperature=temperature)
    return np.asarray(scores.logprobs)[completed]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_the_trainer_computes(temperature):
    asked = requests(6, temperature=temperature)
    for request, completion in zip(asked, generate(make_engine(), asked), strict=True):
        np.testing.assert_allclose(completion.logprobs, trainer_logprobs(request, completion, temperature), atol=1e-4)


def test_greedy_tokens_are_the_argmax_of_the_trainers_logits():
    asked = requests(4, temperature=0.0, max_tokens=30)
    for request, completion in zip(asked, generate(make_engine(), asked), strict=True):
        ids = np.concatenate([request.prompt_ids, completion.ids])[None]
        hidden = transformer.hidden_states(CONFIG, PARAMS, ids, np.arange(ids.shape[1])[None], None)
        best = np.asarray(transformer.logits(CONFIG, PARAMS, hidden)).argmax(-1)[0]
        np.testing.assert_array_equal(best[len(request.prompt_ids) - 1 : -1], completion.ids)
        np.testing.assert_allclose(completion.logprobs, trainer_logprobs(request, completion, 1.0), atol=1e-4)


def test_layers_with_a_window_keep_no_more_than_it_and_change_nothing():
    asked = requests(9, max_tokens=30)
    engine = make_engine(WINDOWED, WINDOWED_PARAMS)
    together = generate(engine, asked)
    assert [layer["k"].shape[2] for layer in engine._cache] == [11, 96]
    assert max(len(completion.ids) for completion in together) > 22  # the window is passed twice
    for request, completion in zip(asked, together, strict=True):
        expected = trainer_logprobs(request, completion, 0.9, WINDOWED, WINDOWED_PARAMS)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    alone = generate(make_engine(WINDOWED, WINDOWED_PARAMS), asked[:1])[0]
    assert alone.logprobs.tobytes() == together[0].logprobs.tobytes()


def test_a_bfloat16_cache_is_near_and_half_as_large():
    asked = requests(6)
    exact, rough = (make_engine(WINDOWED, WINDOWED_PARAMS, cache_dtype=dtype) for dtype in ("float32", "bfloat16"))
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(engine._cache)) for engine in (exact, rough)]
    assert sizes[0] == 2 * sizes[1]
    off = [
        completion.logprobs - trainer_logprobs(request, completion, 0.9, WINDOWED, WINDOWED_PARAMS)
        for request, completion in zip(asked, generate(rough, asked), strict=True)
    ]
    assert 1e-4 < np.abs(np.concatenate(off)).max() < 0.1
    assert EngineConfig().fingerprint() == {}
    assert EngineConfig(cache_dtype="bfloat16").fingerprint() == {"cache_dtype": "bfloat16"}


def test_a_completion_depends_on_its_request_alone():
    asked = requests(14)
    together = generate(make_engine(), asked)
    order = np.random.default_rng(1).permutation(len(asked))
    shuffled = generate(make_engine(chunk=3), [asked[index] for index in order])
    alone = [generate(make_engine(), [request])[0] for request in asked[:4]]
    for position, index in enumerate(order):
        assert shuffled[position].ids.tobytes() == together[index].ids.tobytes()
        assert shuffled[position].logprobs.tobytes() == together[index].logprobs.tobytes()
    for one, other in zip(alone, together, strict=False):
        assert one.logprobs.tobytes() == other.logprobs.tobytes()


@pytest.mark.parametrize("model", [(CONFIG, PARAMS), (WINDOWED, WINDOWED_PARAMS)], ids=["full", "windowed"])
def test_prompts_that_share_a_beginning_yield_what_the_trainer_computes(model):
    asked = sharing()
    asked = [
        replace(each, sampling=replace(each.sampling, temperature=place % 2 * 0.9)) for place, each in enumerate(asked)
    ]
    completions = generate(make_engine(*model), asked)
    texts = np.zeros((len(asked), 96), np.int32)
    for text, request, completion in zip(texts, asked, completions, strict=True):
        ids = np.concatenate([request.prompt_ids, completion.ids])
        text[: len(ids)] = ids
    for logits, request, completion in zip(our_logits(*model, texts), asked, completions, strict=True):
        start, temperature = len(request.prompt_ids) - 1, request.sampling.temperature
        logits = logits[start : start + len(completion.ids)]
        if temperature == 0:
            np.testing.assert_array_equal(completion.ids, logits.argmax(-1))
        logprobs = np.asarray(jax.nn.log_softmax(logits / (temperature or 1.0)))
        expected = logprobs[np.arange(len(logits)), completion.ids]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("model", [(CONFIG, PARAMS), (WINDOWED, WINDOWED_PARAMS)], ids=["full", "windowed"])
def test_a_completion_does_not_depend_on_whether_its_beginning_is_at_hand(model):
    asked = sharing() + requests(5, max_tokens=12)
    engine = make_engine(*model)
    found = [generate(engine, asked), generate(engine, asked)]  # the second finds some of it prefilled
    order = np.random.default_rng(2).permutation(len(asked))
    shuffled = generate(make_engine(*model, chunk=3), [asked[index] for index in order])
    found.append([shuffled[place] for place in np.argsort(order)])
    found.append([generate(make_engine(*model), [request])[0] for request in asked])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert one.ids.tobytes() == other.ids.tobytes()
            assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_a_shared_beginning_is_prefilled_once_and_not_kept_for_ever():
    beginning, *others = requests(30)
    first = beginning.prompt_ids[:40]
    asked = [
        replace(each, prompt_ids=np.concatenate([first, each.prompt_ids[:20]]), shared=len(first)) for each in others
    ]
    engine = make_engine()
    completions = generate(engine, [*asked, asked[0]])
    rests = [len(request.prompt_ids) - 1 - len(first) for request in asked]
    # The last is asked again when its own part is long forgotten, but the beginning is not.
    assert engine.prefilled_tokens == len(first) + sum(rests) + rests[0]
    cached = [completion.cached_tokens for completion in completions]
    assert cached == [0] + [len(first)] * len(others)
    generate(engine, requests(60))
    assert len(engine._prefills) == len(engine._rests) == 6
    engine.update_weights(PARAMS, "newer")
    assert len(engine._prefills) == len(engine._rests) == 0


def test_samples_of_one_prompt_differ_by_seed_and_share_the_prefill(caplog):
    caplog.set_level("INFO", "agentark_jax")
    base = requests(1)[0]
    asked = [Request(base.prompt_ids, Sampling(1.0, 20, (EOS,), seed)) for seed in (1, 2, 1 + 2**32)]
    engine = make_engine()
    texts = [tuple(completion.ids) for completion in generate(engine, asked)]
    assert len(set(texts)) == 3
    assert engine.prefilled_tokens == len(base.prompt_ids) - 1
    assert engine.sampled_tokens == sum(map(len, texts))
    said = [line for line in caplog.messages if line.startswith("attention")]  # once for each bucket that is used
    assert len(said) == 1
    assert said[0] == "attention of prefills: xla; there are no kernels for cpu"


def test_completions_end_at_a_stop_id_or_at_the_limit():
    long = requests(3, max_tokens=12)
    for completion in generate(make_engine(), long):
        assert completion.finish == ("stop" if completion.ids[-1] == EOS else "length")
        assert len(completion.ids) <= 12
        assert EOS not in completion.ids[:-1]
    first = generate(make_engine(), long[:1])[0]
    stopping = Request(long[0].prompt_ids, Sampling(0.9, 12, (EOS, int(first.ids[4])), long[0].sampling.seed))
    stopped = generate(make_engine(), [stopping])[0]
    assert stopped.finish == "stop"
    assert stopped.ids.tolist() == first.ids[: first.ids.tolist().index(first.ids[4]) + 1].tolist()


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([5] * 90, {}, "engine.context"),
        ([5, VOCABULARY], {}, "vocabulary"),
        ([5, -1], {}, "vocabulary"),
        ([], {}, "prompt"),
        ([5], {"max_tokens": 0}, "max_tokens"),
        ([5], {"stop_ids": (1, 2, 3, 4, 5)}, "stop ids"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(prompt, sampling, message):
    request = Request(
        np.asarray(prompt, np.int32),
        Sampling(**{"temperature": 1.0, "max_tokens": 20, "stop_ids": (EOS,), "seed": 0, **sampling}),
    )
    with pytest.raises(AgentArkError, match=message):
        generate(make_engine(), [request])


def test_a_failure_reaches_everyone_and_the_engine_goes_on(monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(engine, "_decode", lambda: (_ for _ in ()).throw(AgentArkError("device lost")))
    with pytest.raises(AgentArkError, match="device lost"):
        generate(engine, requests(6))
    monkeypatch.undo()
    asked = requests(3)
    for one, other in zip(generate(engine, asked), generate(make_engine(), asked), strict=True):
        assert one.ids.tobytes() == other.ids.tobytes()


def test_sampling_follows_the_distribution():
    logits = np.random.default_rng(0).normal(size=(1, 700)).astype(np.float32) * 2
    draws = 40_000
    uniforms = (np.arange(draws, dtype=np.float32) + 0.5) / draws
    batch = 4_000
    tokens = np.concatenate(
        [
            np.asarray(
                sample(
                    np.repeat(logits, batch, 0), uniforms[i : i + batch], np.full(batch, 0.8, "f"), np.ones(batch, "f")
                )[0]
            )
            for i in range(0, draws, batch)
        ]
    )
    expected = np.exp(logits[0] / 0.8 - np.logaddexp.reduce(logits[0] / 0.8))
    # Evenly spaced uniforms through an inverse distribution function: each frequency is off by a draw or two at most.
    assert np.abs(np.bincount(tokens, minlength=700) / draws - expected).max() < 3 / draws


def test_top_p_keeps_the_likeliest_tokens_and_leaves_logprobs_whole():
    logits = np.log(np.asarray([[0.5, 0.3, 0.15, 0.05]], np.float32)).repeat(999, 0)
    uniforms = np.linspace(0, 0.9999, 999, dtype=np.float32)
    tokens, logprobs = sample(logits, uniforms, np.ones(999, "f"), np.full(999, 0.7, "f"))
    assert set(np.asarray(tokens).tolist()) == {0, 1}
    assert np.mean(np.asarray(tokens) == 0) == pytest.approx(0.5 / 0.8, abs=0.01)
    np.testing.assert_allclose(np.exp(np.asarray(logprobs)), np.where(np.asarray(tokens) == 0, 0.5, 0.3), rtol=1e-5)


@pytest.mark.parametrize("edge", [0.0, np.nextafter(np.float32(1), np.float32(0))])
def test_extreme_uniforms_never_draw_an_impossible_token(edge):
    logits = np.full((2, 1025), -np.inf, np.float32)
    logits[0, 600], logits[1, 1024] = 0.0, 0.0
    tokens, logprobs = sample(logits, np.full(2, edge, "f"), np.ones(2, "f"), np.ones(2, "f"))
    assert np.asarray(tokens).tolist() == [600, 1024]
    np.testing.assert_allclose(logprobs, 0, atol=1e-6)


def test_engine_settings_are_checked():
    with pytest.raises(UsageError, match=r"engine\.slots"):
        EngineConfig(slots=0)
    with pytest.raises(UsageError, match=r"engine\.cache_dtype is 'int8': choose float32 or bfloat16"):
        EngineConfig(cache_dtype="int8")


def test_on_gpus_decoding_is_compiled_with_an_option_that_xla_knows_and_that_changes_no_token():
    assert decoder("cpu") is decoder("cpu")
    engine, asked = make_engine(), requests(3)
    expected = generate(make_engine(), asked)
    engine._platform = "gpu"
    with pytest.MonkeyPatch.context() as patch:
        asked_for = []
        patch.setattr(local, "decoder", lambda platform: asked_for.append(platform) or decoder(platform))
        found = generate(engine, asked)
    assert set(asked_for) == {"gpu"}
    assert [completion.ids.tolist() for completion in found] == [completion.ids.tolist() for completion in expected]


def test_steps_score_the_same_whichever_operand_comes_first():
    """Few hidden states and many take different products on CPU."""
    random = np.random.default_rng(0)
    hidden = random.normal(size=(transformer._FEW_ROWS + 1, CONFIG.hidden_size)).astype(np.float32)
    expected = hidden.astype(np.float64) @ np.asarray(PARAMS["embedding"], np.float64).T
    for rows in (1, 5, transformer._FEW_ROWS, transformer._FEW_ROWS + 1):
        scores = transformer.logits(CONFIG, PARAMS, hidden[:rows])
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected[:rows], atol=1e-5)
