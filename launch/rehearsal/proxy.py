"""A proxy before a server that knows which calls were sent to it, when, and what it answered."""

import asyncio
import json
import logging
import math
import threading
import time
from dataclasses import dataclass

import aiohttp
from aiohttp import web

# A router that looks for servers tries gRPC first, of which aiohttp would complain.
_unheard = logging.getLogger(__name__)
_unheard.setLevel(logging.CRITICAL)

# Which call it is: its seed, which follows from its place in the protocol; the version of the weights; the prompt.
Identity = tuple[int, str | None, tuple[int, ...]]


@dataclass
class Asked:
    """A call that reached the server: its status (None: the connection broke), and the ids that weights `by` said."""

    identity: Identity
    began: float
    status: int | None = None
    by: str | None = None
    ids: tuple[int, ...] = ()
    ended: float = math.inf


class Proxy:
    """Passes everything on; a context manager, at work in a thread of its own. `asked` is in the order of arrival."""

    def __init__(self, upstream: str):
        self.asked: list[Asked] = []
        self.url = ""
        self._upstream = upstream
        self._version: str | None = None  # of the weights that a client gave last: those that calls are meant for
        self._ready, self._stop, self._loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()), daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as self._session:
            runner = web.ServerRunner(web.Server(self._handle, logger=_unheard), shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._ready.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        content = await request.read()
        asked = self._noted(request.path, content)
        headers = {"Content-Type": "application/json"} if content else {}
        url = self._upstream + request.path
        try:
            async with self._session.request(request.method, url, data=content or None, headers=headers) as answer:
                said, status = await answer.read(), answer.status
        except (aiohttp.ClientError, OSError) as error:
            if asked is not None and isinstance(error, aiohttp.ClientConnectorError):
                self.asked.remove(asked)  # there is no server, so that nothing reached it
            elif asked is not None:
                asked.ended = time.time()
            if request.transport is not None:  # what clients see of a server that is gone
                request.transport.abort()
            return web.Response(status=502)
        if asked is not None:
            asked.status, asked.ended = status, time.time()
            if status == 200:
                found = json.loads(said)
                asked.ids, asked.by = tuple(found["output_ids"]), found["meta_info"]["weight_version"]
        return web.Response(status=status, body=said, content_type="application/json")

    def _noted(self, path: str, content: bytes) -> Asked | None:
        if path == "/update_weights_from_disk":
            self._version = json.loads(content)["weight_version"]
        if path != "/generate":
            return None
        body = json.loads(content)
        identity = body["sampling_params"]["sampling_seed"], self._version, tuple(body["input_ids"])
        self.asked.append(Asked(identity, time.time()))
        return self.asked[-1]
