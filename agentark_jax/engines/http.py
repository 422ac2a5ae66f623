"""Servers that generate, over HTTP: which are healthy, who is asked next, what is tried again.

Hundreds of calls are in flight; each goes to the server with the fewest. A call that fails in a way that may pass is
repeated with growing, jittered pauses. A server that keeps failing gets no calls until its engine admits it again.
"""

import asyncio
import json
import logging
import os
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import aiohttp
import tenacity

from agentark_jax.engines.config import EngineConfig
from agentark_jax.errors import SECRET, AgentArkError, UsageError, plain, redacted

# A text that tokenizers disagree about.
PROBE = "Question: 12 + 7 = 19? Ünïcödé, «quotes» and\n\tspaces."
_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds, the former at first
_FAILURES_IN_A_ROW = 3  # that close a server

T = TypeVar("T")
logger = logging.getLogger(__name__)


class ServerFault(Exception):
    """A failure of a server that may pass: no connection, a busy server, an answer that cannot be true."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(plain(message)))


@dataclass
class Server:
    url: str
    in_flight: int = 0
    failures: int = 0  # in a row
    healthy: asyncio.Event = field(default_factory=asyncio.Event)
    recovery: "asyncio.Task[None] | None" = None


class Servers:
    """The servers of a config; an async context manager, entered while its engine is.

    Args:
        admit: checks a server before it gets calls, at first and after it was closed. Raises UsageError for one that
            will not do, ServerFault for one that fails meanwhile.
        token_variable: the environment variable that has the servers' API key, if they have one.
    """

    def __init__(self, config: EngineConfig, admit: Callable[[Server], Awaitable[None]], token_variable: str) -> None:
        self.retries = 0
        self._config, self._admit, self._token_variable = config, admit, token_variable

    async def __aenter__(self) -> "Servers":
        """Raises UsageError for a server that is absent, will not do, or refuses the token."""
        self._token = os.environ.get(self._token_variable)
        self._room = asyncio.Semaphore(self._config.in_flight)
        self._servers = [Server(url.rstrip("/")) for url in self._config.servers]
        async with AsyncExitStack() as stack:
            self._session = await stack.enter_async_context(
                aiohttp.ClientSession(
                    headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
                    timeout=aiohttp.ClientTimeout(total=self._config.timeout, sock_connect=10),
                    connector=aiohttp.TCPConnector(limit=0),
                )
            )
            try:
                await asyncio.gather(*map(self._open, self._servers))
            except ServerFault as fault:
                raise UsageError(f"{fault}; start the servers first, or correct their addresses") from fault
            self._entered = stack.pop_all()
        return self

    async def __aexit__(self, *error: Any) -> None:
        for server in self._servers:
            if server.recovery is not None:
                server.recovery.cancel()
        await self._entered.aclose()

    # A call

    async def call(
        self,
        path: str,
        body: Mapping[str, Any],
        believed: Callable[[Server, Mapping[str, Any], Mapping[str, Any]], T],
    ) -> T:
        """What `believed` makes of some server's answer, after as many tries as the config allows.

        It is given the server, the answer and the body, and raises ServerFault for an answer that cannot be true.

        Raises AgentArkError where the servers went on failing, or refuse the request.
        """
        async with self._room:
            return await self._repeated(lambda: self._try(path, body, believed))

    async def each(self, action: Callable[[Server], Awaitable[T]]) -> dict[str, T]:
        """What an action yields of every server, by address, with as many tries of each as the config allows.

        Raises AgentArkError naming all servers of which it failed for good.
        """
        found: dict[str, T] = {}
        failures = []

        async def ask(server: Server) -> None:
            try:
                found[server.url] = await self._repeated(partial(action, server))
            except AgentArkError as error:
                failures.append(error)

        await asyncio.gather(*map(ask, self._servers))
        if failures:
            raise AgentArkError("; ".join(map(str, failures))) from failures[0]
        return found

    async def admit_again(self) -> None:
        """Closes all servers and has the engine admit each of them anew. No call may be in flight.

        Raises AgentArkError naming those that it could not admit; they stay closed.
        """
        if any(server.in_flight for server in self._servers):
            raise ValueError("calls are in flight; wait for them first")
        for server in self._servers:
            if server.recovery is not None:
                server.recovery.cancel()
            server.healthy.clear()
        await self.each(self._open)

    async def _repeated(self, action: Callable[[], Awaitable[T]]) -> T:
        # Not tenacity, whose bookkeeping took a quarter of the client's time for a call that succeeds at once.
        for attempt in range(self._config.attempts):
            if attempt:
                self.retries += 1
                await asyncio.sleep(random.uniform(0, min(_LONGEST_PAUSE, _PAUSE * 2 ** (attempt - 1))))
            try:
                return await action()
            except ServerFault as fault:
                last = fault
        raise AgentArkError(f"{self._config.attempts} attempts failed, the last: {last}") from last

    async def _try(self, path: str, body: Mapping[str, Any], believed: Callable[..., T]) -> T:
        server = await self._choose()
        server.in_flight += 1
        try:
            answer = believed(server, await self.post(server, path, body), body)
        except ServerFault:
            self._note_failure(server)
            raise
        finally:
            server.in_flight -= 1
        server.failures = 0
        return answer

    async def _choose(self) -> Server:
        """The healthy server with the fewest calls; waits for one to recover as long as a call may take."""
        healthy = [server for server in self._servers if server.healthy.is_set()]
        if not healthy:
            waits = [asyncio.ensure_future(server.healthy.wait()) for server in self._servers]
            try:
                await asyncio.wait(waits, timeout=self._config.timeout, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            healthy = [server for server in self._servers if server.healthy.is_set()]
        if not healthy:
            raise ServerFault(f"no server was healthy for {self._config.timeout:.0f} s")
        return min(healthy, key=lambda server: server.in_flight)

    async def post(self, server: Server, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that a server answers. Raises ServerFault, or AgentArkError for a request it refuses."""
        status, content = await self._exchange(server, "POST", path, body)
        if status == 429 or status >= 500:
            raise ServerFault(f"{server.url}{path} answers {status}: {self._shown(content)}")
        if status != 200:
            raise AgentArkError(f"{server.url}{path} refuses the request ({status}): {self._shown(content)}")
        return _object(server, path, content)

    async def get(self, server: Server, path: str, missing: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object at a path of a server; `missing`, where that is given, if the server knows no such path.

        Raises ServerFault where there is none.
        """
        status, content = await self._exchange(server, "GET", path)
        if status == 404 and missing is not None:
            return missing
        if status != 200:
            raise ServerFault(f"{server.url}{path} answers {status}")
        return _object(server, path, content)

    async def _exchange(
        self, server: Server, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, bytes]:
        """Status and content of an answer. Raises ServerFault where none came, UsageError for a refused token."""
        try:
            async with self._session.request(method, server.url + path, json=body) as response:
                status, content = response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            said = f"{type(error).__name__} {error}".rstrip()
            raise ServerFault(f"{server.url}{path} does not answer: {said}") from error
        if status in (401, 403):
            raise UsageError(f"{server.url} refuses the token: set {self._token_variable} to the server's API key")
        return status, content

    def _shown(self, content: bytes, length: int = 300) -> str:
        """The beginning of what a server says, printable and without the token, however short that is."""
        text = redacted(content.decode(errors="replace"))
        if self._token:
            text = text.replace(self._token, SECRET)
        return "".join(letter if letter.isprintable() else " " for letter in text[:length])

    # Servers that fail and recover

    async def _open(self, server: Server) -> None:
        await self._admit(server)
        server.failures = 0
        server.healthy.set()

    def _note_failure(self, server: Server) -> None:
        server.failures += 1
        if server.failures >= _FAILURES_IN_A_ROW and server.healthy.is_set():
            server.healthy.clear()
            logger.warning("%s fails; it gets no calls until it is healthy again", server.url)
            server.recovery = asyncio.create_task(self._recover(server))

    async def _recover(self, server: Server) -> None:
        """Waits until the engine admits the server again, and lets it take part.

        Whatever keeps it away is said and tried again: the others can go on without it.
        """

        def say(state: tenacity.RetryCallState) -> None:
            logger.warning("%s is not back: %s", server.url, state.outcome and state.outcome.exception())

        tries = tenacity.AsyncRetrying(
            wait=tenacity.wait_random_exponential(multiplier=_PAUSE, max=_LONGEST_PAUSE),
            retry=tenacity.retry_if_exception_type((ServerFault, AgentArkError)),
            before_sleep=say,
        )
        await tries(self._open, server)
        logger.warning("%s is healthy again", server.url)


@contextmanager
def must_have(server: Server) -> Iterator[None]:
    """Makes a ServerFault of what goes wrong where an answer is not of the form that it must have."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ServerFault(f"{server.url}: the answer lacks what it must have ({error!r:.200})") from error


def _object(server: Server, path: str, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets in brackets without end
        raise ServerFault(f"{server.url}{path}: the answer is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ServerFault(f"{server.url}{path}: the answer is no object")
    return found
