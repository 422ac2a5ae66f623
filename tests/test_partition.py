"""Which parameters are trained: the last layers of stacked ones, however the layers are stacked."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from test_training import MODEL

from agentark_jax.errors import UsageError
from agentark_jax.models.transformer import param_shapes, unstack
from agentark_jax.training.state import merge, partition

LOCAL, GLOBAL = "sliding_attention", "full_attention"
PATTERNS = {
    "period 1": (LOCAL,) * 5,
    "period 6": ((LOCAL,) * 5 + (GLOBAL,)) * 2,
    "period 6 and two more": ((LOCAL,) * 5 + (GLOBAL,)) * 2 + (LOCAL,) * 2,
    "period 2 and one more": (LOCAL, GLOBAL) * 2 + (LOCAL,),
}


def numbered(layer_types):
    """A model and parameters of which each layer's are all its number, and the others' are -1."""
    model = replace(MODEL, layer_types=layer_types)
    shapes = flatten_dict(param_shapes(model), sep=".")
    period = len({path.split(".")[1] for path in shapes if path.startswith("scanned.")})
    params = {}
    for path, leaf in shapes.items():
        top, number = [*path.split("."), ""][:2]
        if top == "scanned":
            layers = int(number) + period * np.arange(leaf.shape[0])
            value = np.broadcast_to(layers.reshape(-1, *[1] * (leaf.ndim - 1)), leaf.shape)
        elif top == "rest":
            scanned = next(shapes[other].shape[0] for other in shapes if other.startswith("scanned."))
            value = np.full(leaf.shape, period * scanned + int(number))
        else:
            value = np.full(leaf.shape, -1)
        params[path] = jnp.asarray(value, jnp.float32)
    return model, unflatten_dict(params, sep=".")


@pytest.mark.parametrize("name", PATTERNS)
def test_the_last_layers_are_those_of_the_model_and_merging_undoes_it(name):
    model, params = numbered(PATTERNS[name])
    count = len(model.layer_types)
    for number, layer in enumerate(unstack(model, params)["layers"]):  # the numbers are the model's
        assert all(np.all(np.asarray(leaf) == number) for leaf in jax.tree.leaves(layer))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    for last in range(1, count + 2):
        trainable, frozen = partition(params, [], last_layers=last)
        numbers = {int(value) for leaf in trainable.values() for value in np.unique(np.asarray(leaf))}
        assert numbers == set(range(max(0, count - last), count))
        others = {int(value) for leaf in frozen.values() for value in np.unique(np.asarray(leaf))}
        assert others == {-1, *range(count - last)}
        assert sum(leaf.size for leaf in (*trainable.values(), *frozen.values())) == size
        merged = merge(trainable, frozen)
        assert jax.tree.structure(merged) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, merged, params)
        shapes, still = partition(param_shapes(model), [], last_layers=last)
        for found, expected in ((shapes, trainable), (still, frozen)):
            assert {path: leaf.shape for path, leaf in found.items()} == {
                path: leaf.shape for path, leaf in expected.items()
            }


def test_what_is_frozen_by_name_stays_frozen_in_the_last_layers():
    _, params = numbered(PATTERNS["period 6 and two more"])
    trainable, frozen = partition(params, ["scanned", "rest.00", "rest.01.mlp"], last_layers=3)
    assert trainable
    assert all(path.startswith("rest.01.") and ".mlp." not in path for path in trainable)
    jax.tree.map(np.testing.assert_array_equal, merge(trainable, frozen), params)
    with pytest.raises(UsageError, match="leaves no parameter to train"):
        partition(params, ["rest", "scanned"], last_layers=1)
