"""The main entry: `python -m agentark_jax.train --config configs/quickstart.yaml`, the same as `agentark run`."""

import sys

from agentark_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]], prog="python -m agentark_jax.train"))
