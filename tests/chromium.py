"""A headless Chromium for tests of a page, over the DevTools protocol."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    """An open page; `events` has what the browser told of it so far."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.events: list[dict[str, Any]] = []
        self._socket, self._last = socket, 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive()).data)
            if message.get("id") == self._last:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    async def run(self, script: str) -> Any:
        """What an expression, or the promise that it gives, comes to."""
        result = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def wait(self, condition: str) -> None:
        for _ in range(600):
            if await self.run(condition):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never true: {condition}")

    async def open(self, path: Path, fragment: str = "") -> float:
        """Seconds until a page and its transcripts are there."""
        await self.call("Page.navigate", url="about:blank")
        self.events.clear()
        start = time.monotonic()
        await self.call("Page.navigate", url=path.as_uri() + fragment)
        await self.wait("document.readyState === 'complete' && document.querySelector('.card') !== null")
        return time.monotonic() - start

    def told(self, *methods: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") in methods]


@asynccontextmanager
async def tab(profile: Path, width: int, height: int = 900) -> AsyncIterator[Tab]:
    """A new browser with one page of `width` × `height` CSS pixels; a phone's where it is narrow."""
    assert BINARY is not None
    command = [BINARY, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    with subprocess.Popen(
        [*command, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as browser:
        try:
            port = await _port(profile / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    address = next(each for each in await answer.json() if each["type"] == "page")
                async with session.ws_connect(address["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Tab(socket)
                    for domain in ("Page", "Runtime", "Network", "Log"):
                        await page.call(f"{domain}.enable")
                    await page.call(
                        "Emulation.setDeviceMetricsOverride",
                        width=width,
                        height=height,
                        deviceScaleFactor=1,
                        mobile=width < 600,
                    )
                    yield page
        finally:
            os.killpg(browser.pid, signal.SIGTERM)


async def _port(path: Path) -> str:
    for _ in range(600):
        if path.exists() and len(lines := path.read_text().split()) > 1:
            return lines[0]
        await asyncio.sleep(0.05)
    raise AssertionError("the browser did not start within 30 s")
