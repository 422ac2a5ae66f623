"""What test_attention.py runs in another process: `python tpu_worker.py SOURCE` compiles a family's step for a TPU.

Prints JSON: how many layers the compiled program has, and its kernels.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import replace

from test_preflight import tiny

from agentark_jax import preflight
from agentark_jax.training.config import FitConfig, MeshConfig
from agentark_jax.training.mesh import fit_attention

WHERE = preflight.topology("v5e-8")
FIT = FitConfig(rows=8, row_length=2048, compute_dtype="bfloat16", remat="products", mesh=MeshConfig(1, 4, 2))

if __name__ == "__main__":
    model = tiny(sys.argv[1])
    model = replace(model, layer_types=model.layer_types[-2:])  # one of each type where there are two
    program = preflight.lower_step(model, FIT, WHERE, fit_attention(FIT, model, "tpu")[0]).compile().as_text()
    kernels = Counter(re.findall(r"%splash_mha_(fwd|dq|dkv)\S* = .*custom-call\(", program))
    print(
        json.dumps(
            {"layers": model.period * (model.num_periods > 0) + model.num_layers % model.period, "kernels": kernels}
        )
    )
