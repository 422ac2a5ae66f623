"""What test_mesh.py and test_attention.py run elsewhere: `python mesh_worker.py eight|two|attention directory`.

Results are written as npz and JSON below the directory; nothing is asserted here.
"""

import json
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import test_training as t
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from agentark_jax.data import loader
from agentark_jax.errors import AgentArkError
from agentark_jax.models.attention import XLA, AttentionPlan, whole_sequences
from agentark_jax.models.config import Lora, load_config
from agentark_jax.models.heads import init_head
from agentark_jax.models.sharding import on_mesh, parameter_sharding, replicated, row_sharding
from agentark_jax.models.source import ScratchConfig
from agentark_jax.models.transformer import init_params
from agentark_jax.models.weights import save_pretrained
from agentark_jax.objectives.chunked import chunked_logprobs, chunked_nll
from agentark_jax.objectives.prm import HEAD, PRM, PROJECTOR, init_projector
from agentark_jax.objectives.sft import SFT
from agentark_jax.records import Example
from agentark_jax.training import distributed
from agentark_jax.training.config import MeshConfig
from agentark_jax.training.job import Job, follow, train
from agentark_jax.training.loop import fit
from agentark_jax.training.mesh import local_rows, make_mesh, place_batch, place_params
from agentark_jax.training.scoring import score_steps
from agentark_jax.training.state import initial_state, make_optimizer, partition, state_shardings
from agentark_jax.training.step import make_step

TIED = replace(t.MODEL, vocab_size=64, num_heads=4, num_kv_heads=1)  # one key/value head: it cannot be divided
UNTIED = replace(
    TIED, num_kv_heads=2, tie_embeddings=False, attention_bias=True, qk_norm=False, sandwich_norms=False,
    final_softcap=None, layer_types=("sliding_attention", "full_attention", "sliding_attention"),
)  # fmt: skip
WIDE = replace(t.MODEL, vocab_size=256, hidden_size=64, intermediate_size=512)
MESHES = {"data": (8, 1, 1), "data_fsdp": (2, 4, 1), "all": (2, 2, 2)}
CONFIG = replace(t.CONFIG, rows=8, epochs=4, checkpoint_every=4)
EXAMPLES = t.make_examples(40)
INTERRUPTED_AT = 5
LORA = Lora(2, 4.0)


def three_steps(model, shape, attention=XLA, **changes):
    """{name: array} after steps: losses, the gradients' first moments after one step, parameters after three."""
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    config = replace(CONFIG, rows=16, **changes)
    trainable, frozen = partition(t.make_params(model), config.freeze)
    optimizer = make_optimizer(config, 10)
    shardings = state_shardings(mesh, optimizer, trainable)
    state = initial_state(mesh, optimizer, trainable)
    step = make_step(config, model, SFT(t.COEFFICIENTS), 10, shardings, attention)
    found = {}
    data = loader.packed_batches(EXAMPLES, seed=0, epochs=3, rows=16, row_length=24)
    for number, batch in enumerate(data.iterate(0, 3, local_rows(mesh, 16))):
        state, metrics = step(state, place_params(mesh, frozen, donate=False), place_batch(mesh, batch, 16))
        for name in ("loss", "nll/answer", "accuracy/answer", "gradient_norm", "tokens", "loss_tokens"):
            found[f"{name} {number}"] = np.asarray(metrics[name])
        if number == 0:
            moments = optax.tree.get(state.optimizer, "mu")
            found |= {f"moment {path}": np.asarray(leaf) for path, leaf in moments.items()}
    assert step._cache_size() == 1
    return found | {f"param {path}": np.asarray(leaf) for path, leaf in state.params.items()}


def judged_examples():
    """Examples with steps, four answers to each of eight questions."""
    rng = np.random.default_rng(3)
    found = []
    for number in range(32):
        length = int(rng.integers(8, 14))
        ends = np.sort(rng.choice(np.arange(2, length), 3, replace=False))
        ids = rng.integers(1, TIED.vocab_size, length).astype(np.int32)
        labels = rng.integers(0, 2, 3).astype(np.float32)
        found.append(Example(ids, {}, f"q{number % 8}", "steps", step_ends=ends.astype(np.int32), step_labels=labels))
    return found


def judged_steps(shape):
    """{name: array}: losses, first moments and scores of a process reward model's steps on a mesh."""
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    config = replace(CONFIG, rows=32, last_layers=2, accumulation=2)
    trainable, frozen = partition(t.make_params(TIED), [], last_layers=config.last_layers)
    beside = {HEAD: init_head(TIED, "prm", 1), PROJECTOR: init_projector(TIED.hidden_size, 2)}
    trainable |= flatten_dict(beside, sep=".")
    optimizer = make_optimizer(config, 10)
    shardings = state_shardings(mesh, optimizer, trainable)
    state = initial_state(mesh, optimizer, trainable)
    objective = PRM({"contrastive": 1.0, "cross_entropy": 0.5, "supervised_contrastive": 0.25}, 0.3)
    step = make_step(config, TIED, objective, 10, shardings)
    data = loader.packed_batches(judged_examples(), seed=0, epochs=1, rows=32, row_length=24, together=16)
    batch = place_batch(mesh, data.batch(0), 32)
    state, metrics = step(state, place_params(mesh, frozen, donate=False), batch)
    found = {name: np.asarray(value) for name, value in metrics.items()}
    found |= {f"moment {path}": np.asarray(leaf) for path, leaf in optax.tree.get(state.optimizer, "mu").items()}
    whole = place_params(mesh, flatten_dict(t.make_params(TIED), sep="."), donate=False)
    sequences = [(example.ids, example.step_ends) for example in judged_examples()]
    head = init_head(TIED, "prm", 1)
    scores = score_steps(TIED, unflatten_dict(whole, sep="."), head, sequences, mesh, tokens=64)
    return found | {"scores": np.concatenate(scores)}


def attend(plan, shape, kv_heads):
    """{name: array} of what six query heads make of packed rows on a mesh, and the gradients of all that goes in."""
    model, length = replace(t.MIXED, num_heads=6, num_kv_heads=kv_heads), 32
    rng = np.random.default_rng(0)
    segment_ids = np.repeat(rng.integers(0, 3, (4, 4)), 8, axis=1)
    shapes = {"query": (4, length, 6, 8), "key": (4, kv_heads, length, 8), "value": (4, kv_heads, length, 8)}
    arrays = {name: rng.normal(size=size).astype(np.float32) for name, size in shapes.items()}
    direction = rng.normal(size=shapes["query"])
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])

    def loss(arrays, segment_ids):
        with on_mesh(mesh):
            kernel = whole_sequences(model, length, segment_ids, plan)["full_attention"]
            mixed = kernel(arrays["query"], arrays["key"], arrays["value"], 0.3, None)
        return (mixed * direction).sum(), mixed

    gradients, mixed = jax.jit(jax.grad(loss, has_aux=True))(*jax.device_put((arrays, segment_ids), replicated(mesh)))
    return {"mixed": np.asarray(mixed), **{name: np.asarray(leaf) for name, leaf in gradients.items()}}


def attention(directory):
    plan = AttentionPlan("pallas", "xla", interpret=True)
    for kv_heads in (2, 3):
        np.savez(directory / f"kernel_{kv_heads}.npz", **attend(plan, (2, 2, 2), kv_heads))
    model = replace(TIED, layer_types=("sliding_attention", "full_attention"))
    np.savez(directory / "steps_one.npz", **three_steps(model, (1, 1, 1)))
    np.savez(directory / "steps.npz", **three_steps(model, (2, 2, 2), plan, accumulation=2))


def state_bytes():
    """(bytes of the whole state, bytes on each device) of a model on eight fsdp devices."""
    mesh = make_mesh(MeshConfig())
    trainable, _ = partition(t.make_params(WIDE), [])
    leaves = jax.tree.leaves(initial_state(mesh, make_optimizer(CONFIG, 10), trainable))
    held = dict.fromkeys(map(str, jax.devices()), 0)
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[str(shard.device)] += shard.data.nbytes
    return sum(leaf.nbytes for leaf in leaves), list(held.values())


def loss_collectives():
    """(operation, shape) of all that devices exchange for the loss of [64, 16] hidden states and its gradients."""
    mesh = make_mesh(MeshConfig(2, 4, 1))
    rows, head = row_sharding(mesh), parameter_sharding("unembedding", (48, 16), mesh)

    def loss(hidden, unembedding, targets, mask):
        with on_mesh(mesh):
            return chunked_nll(hidden, unembedding, targets, jnp.ones(64), mask, chunk_bytes=3 * 48 * 4)[0]

    shapes = [((64, 16), jnp.float32, rows), ((48, 16), jnp.float32, head), ((64,), int, rows), ((64,), bool, rows)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype, place in shapes]
    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile().as_text()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return [[kind, shape] for shape, kind in re.findall(rf"= \w+\[([\d,]*)\]\S* ({kinds})\(", text)]


def scores(shape):
    """{name: array}: log-probabilities, entropies, correct, and the gradients of an objective of the first two."""
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    random, vocabulary = np.random.default_rng(0), 2036  # the head's gradient is summed in a few more rows
    hidden, head = (jnp.asarray(random.normal(size=size), jnp.float32) for size in ((64, 16), (vocabulary, 16)))
    targets, mask = jnp.asarray(random.integers(0, vocabulary, 64)), jnp.asarray(random.random(64) < 0.6)
    targets = targets.at[::2].set(jnp.argmax(hidden @ head.T, axis=1)[::2])

    def objective(hidden, head):
        with on_mesh(mesh):
            settings = {"temperature": 0.7, "soft_cap": 20.0, "entropy": True, "chunk_bytes": 3 * vocabulary * 4}
            found = chunked_logprobs(hidden, head, targets, mask, **settings)
        return jnp.sum(found.logprobs**2 + found.entropy), (found, found.entropy.sum())

    def entropy_alone(hidden, head):
        return objective(hidden, head)[1][1]

    rows, columns = row_sharding(mesh), parameter_sharding("unembedding", head.shape, mesh)
    placed = jax.device_put(hidden, rows), jax.device_put(head, columns)
    (_, (found, _)), both = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(*placed)
    gradients = dict(zip(("of hidden", "of head"), both, strict=True))
    gradients["of the entropy alone"] = jax.jit(jax.grad(entropy_alone))(*placed)
    return {name: np.asarray(leaf) for name, leaf in {**found._asdict(), **gradients}.items()}


class Interrupted(Exception):
    pass


def interrupt(done, total, tokens):
    if done >= INTERRUPTED_AT:
        raise Interrupted


def run(directory, mesh, progress=None, **changes):
    """One fit; its history and parameters, whole, or None if it is interrupted."""
    config = replace(CONFIG, mesh=MeshConfig(*mesh), **changes)
    arguments = {"seed": 7, "fingerprint": {"model": "tiny"}, "directory": directory, "progress": progress}
    try:
        result = fit(config, TIED, t.make_params(TIED), EXAMPLES, **arguments)
    except Interrupted:
        return None
    trainable, _ = partition(result.params, [])
    params = {
        path: np.asarray(leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True))
        for path, leaf in trainable.items()
    }
    return {"history": np.asarray(result.history), "tokens": np.asarray(result.tokens), **params}


def make_base(directory):
    """A small random model below the directory, from which `jobs` start."""
    raw = ScratchConfig(hidden_size=32, layers=3, heads=4, head_dim=8, intermediate_size=48, max_positions=64)
    base = directory / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(raw.to_hf(vocabulary=64, bos_id=None, eos_id=1)))
    config = load_config(base)
    save_pretrained(base, config, init_params(config, 3), base)


def jobs(directory, place, mesh):
    """Three jobs from the model in `directory`, their results below `place`: all parameters, adapters, and a process
    reward model's last layer.
    """
    for name, changes in (("trained", {}), ("adapted", {"lora": LORA}), ("judging", {"last_layers": 1})):
        (place / name).mkdir(parents=True, exist_ok=True)
        config = replace(CONFIG, learning_rate=1e-3, steps=4, mesh=MeshConfig(*mesh), **changes)
        objective = PRM({"contrastive": 1.0, "supervised_contrastive": 0.5}) if name == "judging" else None
        examples = judged_examples() if objective else EXAMPLES
        yield Job(config, directory / "base", "base", examples, [], place / name, 7, objective)


def eight(directory):
    make_base(directory)
    for name, model in (("tied", TIED), ("untied", UNTIED)):
        np.savez(directory / f"{name}_one.npz", **three_steps(model, (1, 1, 1)))
        for mesh, shape in MESHES.items():
            if name == "tied" or mesh == "all":
                changes = {"accumulation": 2, "remat": "outputs"} if mesh == "all" else {}
                found = three_steps(model, shape, **changes)
                np.savez(directory / f"{name}_{mesh}.npz", **found)
    for name, shape in {"one": (1, 1, 1), **MESHES}.items():
        np.savez(directory / f"scores_{name}.npz", **scores(shape))
    for name, shape in {"one": (1, 1, 1), "all": (2, 2, 2)}.items():
        np.savez(directory / f"judged_{name}.npz", **judged_steps(shape))
    total, held = state_bytes()
    (directory / "collectives.json").write_text(json.dumps(loss_collectives()))
    (directory / "bytes.json").write_text(json.dumps({"total": total, "held": held}))
    np.savez(directory / "whole.npz", **run(directory / "whole", (2, 2, 2)))
    np.savez(directory / "adapted.npz", **run(directory / "adapted", (2, 2, 2), lora=LORA))
    run(directory / "same", (2, 2, 2), interrupt)
    np.savez(directory / "same.npz", **run(directory / "same", (2, 2, 2)))
    for name in ("to_one", "to_two"):
        run(directory / name, (1, 8, 1), interrupt)


def terminated(directory):
    """The exit code of a fit in which one of the processes gets SIGTERM."""

    def progress(done, total, tokens):
        if done == 2 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if done >= 2:
            time.sleep(0.5)  # the others must hear of it before the last step

    try:
        run(directory, (2, 2, 1), progress)
    except SystemExit as stop:
        return stop.code


def complaint(function, *arguments):
    """What the function complains about."""
    try:
        function(*arguments)
    except AgentArkError as error:
        return str(error)


def fail():
    with distributed.leading():
        raise AgentArkError("no paper")


def share_jobs(directory):
    """The two processes do the jobs; then one cannot take part, and at last the leader fails."""
    if distributed.follows():
        follow()
    else:
        with distributed.leading():
            for job in jobs(directory, directory / "jobs", (1, 2, 2)):
                train(job)
    follower = distributed.follows()
    said = [complaint(distributed.agree, "no disk" if follower else None), complaint(follow if follower else fail)]
    (directory / f"said_{jax.process_index()}.json").write_text(json.dumps(said))


def two(directory):
    distributed.initialize()
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
    packed = []
    original = loader.pack_row

    def pack_row(examples, **arguments):
        packed.append(len(examples))
        return original(examples, **arguments)

    loader.pack_row = pack_row
    found = run(directory / "two", (2, 2, 1))
    read = len(packed)
    resumed = run(directory / "to_two", (1, 2, 2))
    if jax.process_index() == 0:
        np.savez(directory / "two.npz", rows_read=read, **found)
        np.savez(directory / "to_two.npz", **resumed)
    share_jobs(directory)
    sys.exit(terminated(directory / "terminated"))


if __name__ == "__main__":
    {"eight": eight, "two": two, "attention": attention}[sys.argv[1]](Path(sys.argv[2]))
