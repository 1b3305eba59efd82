"""A headless Chromium, driven over its DevTools pipe: no driver and no library are needed beside the browser.

async with Browser.started() as browser:
    async with browser.open("http://127.0.0.1:30000/dashboard", width=1280, height=900) as page:
        assert await page.run("document.title") == "Kvist"
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

BOUND_S = 20.0
PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # the tests may run as root, where Chromium's own sandbox cannot
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}


class Browser:
    """One process. The pages share nothing but it: each has a profile of its own."""

    def __init__(self, process: asyncio.subprocess.Process, commands: int, answers: asyncio.StreamReader) -> None:
        self._process = process
        self._commands = commands
        self._answers = answers
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.events: list[dict[str, Any]] = []
        self._reader = asyncio.create_task(self._read())

    @staticmethod
    @contextlib.asynccontextmanager
    async def started() -> AsyncIterator[Browser]:
        """Yield a browser that has started. Chromium reads commands from its descriptor 3 and answers on 4."""
        assert PROGRAM is not None
        (for_browser, commands), (answers, from_browser) = os.pipe(), os.pipe()

        def at_3_and_4() -> None:
            high_3, high_4 = os.dup(for_browser), os.dup(from_browser)
            os.dup2(high_3, 3)
            os.dup2(high_4, 4)

        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            process = await asyncio.create_subprocess_exec(
                PROGRAM,
                *_ARGUMENTS,
                f"--user-data-dir={profile}",
                "about:blank",
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                preexec_fn=at_3_and_4,
                close_fds=False,
                start_new_session=True,
            )
            os.close(for_browser)
            os.close(from_browser)
            reader = asyncio.StreamReader(limit=1 << 26)
            await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(answers, "rb")
            )
            browser = Browser(process, commands, reader)
            try:
                yield browser
            finally:
                browser._reader.cancel()
                os.close(commands)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()

    async def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Return the result of a DevTools command."""
        number = next(self._ids)
        answered = self._waiting[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._commands, msgspec.json.encode(message) + b"\0")
        answer = await asyncio.wait_for(answered, BOUND_S)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    async def _read(self) -> None:
        while True:
            message = msgspec.json.decode((await self._answers.readuntil(b"\0"))[:-1])
            if "id" in message:
                self._waiting.pop(message["id"]).set_result(message)
            else:
                self.events.append(message)

    @contextlib.asynccontextmanager
    async def open(self, url: str, *, width: int, height: int) -> AsyncIterator[Page]:
        """Yield a page that loads, in light colours, and close it at the end."""
        context = (await self.call("Target.createBrowserContext"))["browserContextId"]
        target = await self.call("Target.createTarget", url="about:blank", browserContextId=context)
        session = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, session["sessionId"])
        await page.call("Runtime.enable")
        await page.call("Log.enable")
        await page.resize(width, height)
        await page.set_dark(False)
        await page.call("Page.navigate", url=url)
        try:
            yield page
        finally:
            await self.call("Target.disposeBrowserContext", browserContextId=context)


class Page:
    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        return await self._browser.call(method, self._session, **params)

    async def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str, holds: Callable[[Any], bool] = bool) -> Any:
        """Wait until the value of the expression holds. Return the value."""
        value = None
        try:
            async with asyncio.timeout(BOUND_S):
                while not holds(value := await self.run(expression)):
                    await asyncio.sleep(0.03)
        except TimeoutError:
            raise AssertionError(f"{expression} stayed {value!r}; the page said {self.problems()}") from None
        return value

    async def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "char", "keyUp") if key == "Enter" else ("rawKeyDown", "keyUp"):
            text = {"text": "\r"} if kind == "char" else {}
            await self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key], **text
            )

    async def write(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def resize(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def set_dark(self, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def names(self) -> set[tuple[str, str]]:
        """Return (role, name) of everything that a screen reader announces."""
        await self.call("Accessibility.enable")
        nodes = (await self.call("Accessibility.getFullAXTree"))["nodes"]
        shown = [node for node in nodes if not node.get("ignored")]
        return {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in shown}

    def problems(self) -> list[str]:
        """Return the errors that the page has logged: exceptions, refused by its policy, files that are missing."""
        found = []
        for event in self._browser.events:
            if event.get("sessionId") == self._session:
                if event["method"] == "Runtime.exceptionThrown":
                    found.append(str(event["params"]["exceptionDetails"]))
                elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                    found.append(event["params"]["entry"]["text"] + " " + event["params"]["entry"].get("url", ""))
        return found
