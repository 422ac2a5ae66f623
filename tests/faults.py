"""What tests of faults share: a seed to draw from, and servers in a thread, which no fault of the test's own stops."""

import asyncio
import os
import threading
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

from benchmarks.loopback import Loopback

# Another one kills at other moments and damages other places.
SEED = int(os.environ.get("AGENTARK_FAULT_SEED", "0"))


class Steady(Loopback):
    """A server that gives equal requests equal answers."""

    async def handle(self, request: web.BaseRequest) -> web.Response:
        self._calls = zlib.crc32(await request.read())
        return await super().handle(request)


@contextmanager
def serving(handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> Iterator[str]:
    """The URL of a server that answers as `handle` does, for the time of the block."""
    ready, loop, urls = threading.Event(), asyncio.new_event_loop(), list[str]()
    ended = asyncio.Event()

    async def serve() -> None:
        runner = web.ServerRunner(web.Server(handle), shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
            ready.set()
            await ended.wait()
        finally:
            await runner.cleanup()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
