"""What test_attention.py runs in another process: `python tpu_worker.py SOURCE` compiles a family's step for a TPU.

Prints JSON: how many layers the compiled program has, and by backend its kernels and the bytes of its temporaries.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import replace

from test_preflight import tiny

from agentark_jax import preflight
from agentark_jax.models.attention import XLA
from agentark_jax.training.config import FitConfig, MeshConfig
from agentark_jax.training.mesh import fit_attention

WHERE = preflight.topology("v5e-8")
FIT = FitConfig(rows=8, row_length=2048, compute_dtype="bfloat16", remat="products", mesh=MeshConfig(1, 4, 2))

if __name__ == "__main__":
    model = tiny(sys.argv[1])
    model = replace(model, layer_types=model.layer_types[-2:])  # one of each type where there are two
    found = {"layers": model.period * (model.num_periods > 0) + model.num_layers % model.period}
    for name, plan in (("splash", fit_attention(FIT, model, "tpu")[0]), ("xla", XLA)):
        compiled = preflight.lower_step(model, FIT, WHERE, plan).compile()
        kernels = re.findall(r"%splash_mha_(fwd|dq|dkv)\S* = .*custom-call\(", compiled.as_text())
        found[name] = {"kernels": Counter(kernels), "bytes": compiled.memory_analysis().temp_size_in_bytes}
    print(json.dumps(found))
