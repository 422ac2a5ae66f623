"""What tests of faults draw from: another AGENTARK_FAULT_SEED kills at other moments and damages other places."""

import os

SEED = int(os.environ.get("AGENTARK_FAULT_SEED", "0"))
