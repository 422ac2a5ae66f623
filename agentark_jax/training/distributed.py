"""One program on many hosts: joins the others when the environment says that there are others."""

import os
from collections.abc import Mapping

import jax

from agentark_jax.errors import UsageError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TPU_HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")


def cluster(environment: Mapping[str, str]) -> str | None:
    """What in the environment says that this process is one of several; None for a process of its own.

    - `JAX_COORDINATOR_ADDRESS` (host:port), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`: said explicitly;
    - Slurm: a step of several tasks (`srun`), one process per task;
    - TPU pods and slices (GKE sets them; on queued resources the start script does): several hosts in
      `TPU_WORKER_HOSTNAMES` or `TPU_PROCESS_ADDRESSES`, or several slices (`MEGASCALE_COORDINATOR_ADDRESS`).

    Raises UsageError for an explicit setting that is not complete.
    """
    given = [name for name in _EXPLICIT if environment.get(name)]
    if given and len(given) < len(_EXPLICIT):
        missing = ", ".join(sorted(set(_EXPLICIT) - set(given)))
        raise UsageError(f"the environment sets {', '.join(given)} but not {missing}: set all three or none")
    if given:
        return "explicit"
    if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and environment.get("SLURM_PROCID"):
        return "slurm"
    many_hosts = any("," in environment.get(name, "") for name in _TPU_HOSTS)
    return "tpu" if many_hosts or environment.get("MEGASCALE_COORDINATOR_ADDRESS") else None


def initialize() -> None:
    """Joins the processes that the environment names, before anything else of JAX; does nothing where it names none.

    Raises as `cluster`, and UsageError for numbers that are none.
    """
    found = cluster(os.environ)
    if found is None:
        return
    if found != "explicit":
        jax.distributed.initialize()
        return
    address, count, number = (os.environ[name] for name in _EXPLICIT)
    if not (count.isdigit() and number.isdigit() and int(number) < int(count)):
        raise UsageError(
            f"JAX_PROCESS_ID is {number!r} of JAX_NUM_PROCESSES {count!r}; give a number from 0 to one less than theirs"
        )
    jax.distributed.initialize(address, num_processes=int(count), process_id=int(number))
