"""Many callers, one transaction: turns that finish together are committed together."""

import asyncio

from agentark_jax.records import Turn
from agentark_jax.traces.store import TraceStore


class TurnWriter:
    """Commits the turns of concurrent callers; use it in the thread of the store and of one event loop.

    All turns that arrive in one pass of the event loop make one transaction. No timer is needed: while a commit takes
    its time, more answers become ready, and the next pass finds them all. Since callers wait for their commit, none
    runs ahead of the disk.
    """

    def __init__(self, store: TraceStore):
        self._store = store
        self._waiting: list[tuple[Turn, asyncio.Future[None]]] = []

    async def record(self, turn: Turn) -> None:
        """Keep a turn; it is committed when this returns. A caller that is cancelled meanwhile loses nothing.

        Raises:
            AgentArkError: as `TraceStore.record`. A turn that cannot be kept takes no other turn with it.
        """
        loop = asyncio.get_running_loop()
        committed = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._commit)
        self._waiting.append((turn, committed))
        await committed

    def _commit(self) -> None:
        group, self._waiting = self._waiting, []
        errors: list[Exception | None] = [None] * len(group)
        try:
            self._store.record_many(turn for turn, _ in group)
        except Exception:  # each caller hears of its own turn's failure, and of no other's
            errors = [self._error_of(turn) for turn, _ in group]
        for (_, committed), error in zip(group, errors, strict=True):
            if committed.cancelled():
                continue
            if error is None:
                committed.set_result(None)
            else:
                committed.set_exception(error)

    def _error_of(self, turn: Turn) -> Exception | None:
        try:
            self._store.record(turn)
        except Exception as error:
            return error
        return None
