"""One program on many hosts: joins the others when the environment says that there are others.

The first process leads: it alone asks questions, holds the trace store and writes files. What needs the devices of all
processes it hands out, and the others take part; between two such jobs they wait.
"""

import itertools
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed  # its key-value store: JAX waits for hours in nothing public
from jax.experimental import multihost_utils

from agentark_jax.errors import AgentArkError, UsageError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TPU_HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
_DONE, _FAILED = "done", "failed"
_PATIENCE_MS = 30 * 24 * 3600 * 1000  # a leader that dies ends the wait much sooner

_numbers = itertools.count()


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


def follows() -> bool:
    """Whether another process leads this one."""
    return jax.process_index() > 0


@contextmanager
def leading() -> Iterator[None]:
    """The time in which the first process may hand out jobs; afterwards the others are told how it ended."""
    ending = _FAILED
    try:
        yield
        ending = _DONE
    finally:
        hand_out(ending)


def hand_out(job: Any) -> None:
    """Gives the other processes a job (anything that pickles); does nothing where there are none."""
    if jax.process_count() > 1:
        _store().key_value_set_bytes(f"agentark/{next(_numbers)}", pickle.dumps(job))


def handed_out() -> Iterator[Any]:
    """The jobs that the leader hands out, as they come, until it is done. Raises AgentArkError when it failed."""
    for number in _numbers:
        try:
            found = _store().blocking_key_value_get_bytes(f"agentark/{number}", _PATIENCE_MS)
        except jax.errors.JaxRuntimeError as error:
            raise AgentArkError(f"the first process is gone ({error}); its output says why") from error
        job = pickle.loads(found)
        if job == _FAILED:
            raise AgentArkError("the first process failed; its output says why")
        if job == _DONE:
            return
        yield job


def told(value: Any) -> Any:
    """What the first process has to say in the middle of a job, in all processes; the others' value is ignored.

    Raises AgentArkError when it failed instead.
    """
    if not follows():
        hand_out(value)
        return value
    return next(handed_out())


def _store() -> Any:
    """The key-value store that JAX's coordinator keeps for the processes; there is one once they are initialised."""
    assert jax_distributed.global_state.client is not None, "one of several processes has joined the others"
    return jax_distributed.global_state.client


def agree(problem: str | None) -> None:
    """Returns in all processes, or raises UsageError in all of them when one has a problem: nobody waits for ever.

    The one that has it raises it, the others say which has.
    """
    if jax.process_count() == 1:
        stuck = [] if problem is None else [0]
    else:
        flags = multihost_utils.process_allgather(np.asarray([problem is not None]))
        stuck = np.flatnonzero(flags).tolist()
    if stuck:
        raise UsageError(problem or f"process {', '.join(map(str, stuck))} cannot take part; its output says why")
