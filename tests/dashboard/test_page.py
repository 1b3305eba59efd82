"""The page in a real browser: figures, keys, keyboard, screen readers, light and dark, narrow and wide."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kvist.dashboard import feed
from kvist.dashboard.recorder import LINES
from kvist.errors import Forbidden, KvistError, RequestError
from kvist.http.asgi import send_json
from kvist.request import Role
from kvist.server.config import ServerConfig
from kvist.server.middleware import RawEndpoint
from kvist.testing.gateway_bench import GatewayBench, gateway_bench
from kvist.wire import SetRole
from tests.dashboard.browser import PROGRAM, Browser, Page
from tests.dashboard.fleet import busy_fleet
from tests.dashboard.test_over_http import port_of, served

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed (apt-get install chromium)"),
]
REQUEST = {
    "id": "chatcmpl-0001",
    "endpoint": "/v1/chat/completions",
    "duration_s": 2.0,
    "ttft_s": 0.5,
    "status": "finished",
    "finish_reason": "stop",
    "prompt_tokens": 1200,
    "cached_tokens": {"device": 800, "host": 0, "storage": 0},
    "completion_tokens": 64,
    "workers": ["10.0.0.1:30001"],
    "stages": [
        {"name": "queued", "where": "10.0.0.1:30001", "start_s": 0.0, "duration_s": 0.3, "detail": None},
        {"name": "prefill", "where": "10.0.0.1:30001", "start_s": 0.3, "duration_s": 0.2, "detail": {"tokens": 400}},
        {"name": "decode", "where": "10.0.0.3:30002", "start_s": 0.5, "duration_s": 1.5, "detail": None},
    ],
}


class Served:
    """A gateway over a busy fleet, and its address. /requests answers with `requests`, or raises the error there."""

    def __init__(self, **settings: Any) -> None:
        self.bench: GatewayBench = gateway_bench(config=replace(ServerConfig(), port=0, **settings))
        self.bench.dispatcher.snapshots = busy_fleet()
        self.requests: list[dict[str, Any]] | KvistError = [REQUEST]
        self.url = ""
        app: Any = self.bench.app
        app._inner._router.routes.insert(0, Route("/requests", RawEndpoint(self._answer)))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        if isinstance(self.requests, KvistError):
            raise self.requests
        await send_json(send, {"requests": self.requests})


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with Browser.started() as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def gateway() -> AsyncIterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "INTERVAL_S", 0.4)
        found = Served()
        async with served(found.bench) as server:
            found.url = f"http://127.0.0.1:{port_of(server)}/dashboard"
            yield found


@asynccontextmanager
async def shown(browser: Browser, gateway: Served) -> AsyncIterator[Page]:
    """Open the page, and wait for its figures."""
    async with browser.open(gateway.url, width=1280, height=800) as page:
        await page.until("document.querySelectorAll('.worker').length === 5")
        yield page


def text_of(selector: str) -> str:
    return f"document.querySelector({selector!r})?.textContent ?? ''"


async def test_figures_appear_and_move_and_nothing_is_refused(browser: Browser, gateway: Served) -> None:
    async with shown(browser, gateway) as page:
        assert "tiny" in await page.run(text_of("#about"))
        gateway.bench.app.traffic._metrics.num_requests = 31  # type: ignore[attr-defined]
        await page.until(text_of(".gateway"), lambda text: "31 in flight" in text)
        gateway.bench.dispatcher.snapshots = busy_fleet(second=50)
        await page.until(text_of(".reasons"), lambda text: "490" in text)
        modules = "import('/dashboard/static/charts.js').then((found) => found.CHARTS.flatMap(({ lines }) => lines"
        charted = await page.run(f"{modules}.map(([name]) => name)))")
        assert sorted(charted) == sorted(LINES), "a chart shows each line that the server sends"
        assert await page.run("document.querySelectorAll('.plot canvas').length") == 7
        values = "[...document.querySelectorAll('.plot')].map((each) => each.ariaLabel).join('; ')"
        await page.until(values, lambda text: "Cache hits, of all prompt tokens: cached 6" in text)
        assert "Requests at workers: running 52, waiting 6" in await page.run(values)
        assert "Mooncake pool 3 stores" in await page.run(text_of(".pool"))
        assert page.problems() == []


async def test_a_request_is_a_waterfall_that_opens_by_keyboard(browser: Browser, gateway: Served) -> None:
    async with shown(browser, gateway) as page:
        await page.until("document.querySelectorAll('.waterfall i').length === 3")
        lefts = await page.run("[...document.querySelectorAll('.waterfall i')].map((each) => each.style.left)")
        assert lefts == ["0%", "15%", "25%"]
        await page.run("document.querySelector('.requests button').focus()")
        await page.press("Enter")
        assert "prefill 200 ms from 300 ms at 10.0.0.1:30001, tokens 400" in await page.run(text_of(".stages"))
        assert await page.run("document.activeElement.getAttribute('aria-expanded')") == "true"


async def test_the_page_says_why_there_are_no_requests(browser: Browser, gateway: Served) -> None:
    unknown = RequestError("unknown path")
    unknown.http_status = 404
    for answer, reason in (
        ([], "No request"),
        (Forbidden("only on its host"), "its host"),
        (unknown, "does not record"),
    ):
        gateway.requests = answer
        async with shown(browser, gateway) as page:
            await page.until(text_of("#requests"), lambda text: text != "")
            assert reason in await page.run(text_of("#requests"))
    gateway.requests = [REQUEST]


async def test_a_key_is_asked_for_and_a_wrong_one_refused(browser: Browser) -> None:
    gateway = Served(api_key=("sesame",))
    async with served(gateway.bench) as server:
        gateway.url = f"http://127.0.0.1:{port_of(server)}/dashboard"
        async with browser.open(gateway.url, width=1280, height=800) as page:
            await page.until("document.activeElement?.id === 'key-input'")
            assert await page.run("document.getElementById('main').hidden")
            await page.write("wrong")
            await page.press("Enter")
            await page.until(text_of("#key-problem"), lambda text: "refused" in text)
            await page.write("sesame")
            await page.press("Enter")
            await page.until("document.querySelectorAll('.worker').length === 5")
            assert await page.run("Object.values(sessionStorage)") == ["sesame"]
            assert await page.run("Object.values(localStorage)") == []


async def test_the_keyboard_reaches_everything_in_order_and_everything_has_a_name(
    browser: Browser, gateway: Served
) -> None:
    async with shown(browser, gateway) as page:
        reached = []
        for _ in range(6):
            await page.press("Tab")
            reached.append(await page.run("document.activeElement.value || document.activeElement.textContent"))
        assert reached == ["Skip to the figures", "300", "Theme: auto", "Drain…", "Role…", "Role…"]
        names = await page.names()
        assert {
            ("status", ""),
            ("button", "Role of 10.0.0.3:30002…"),
            ("article", "Worker 10.0.0.1:30001"),
            ("region", "Prefill workers"),
            ("group", "Handoffs from prefill to decode"),
            ("heading", "Routing"),
            ("radio", "5 min"),
        } <= names
        meters = {name for role, name in names if role == "meter"}
        assert meters == {"Device pages", "Host pages"}
        assert any(role in ("image", "img") and name.startswith("Time to first token: 50%") for role, name in names)


async def test_the_page_is_light_or_dark_and_so_are_its_charts(browser: Browser, gateway: Served) -> None:
    async with shown(browser, gateway) as page:
        background = "getComputedStyle(document.body).backgroundColor"
        line = "getComputedStyle(document.querySelector('.swatch')).backgroundColor"
        light = await page.run(background), await page.run(line)
        await page.set_dark(True)
        dark = await page.until(background, lambda color: color != light[0]), await page.run(line)
        assert (light[0], dark[0]) == ("rgb(246, 246, 242)", "rgb(18, 21, 19)")
        assert light[1] != dark[1]
        await page.run("document.getElementById('theme').click()")
        assert await page.run(background) == light[0], "the chosen theme is stronger than the system's"
        assert await page.run(text_of("#theme")) == "Theme: light"


async def test_no_width_needs_sideways_scrolling(browser: Browser, gateway: Served) -> None:
    async with shown(browser, gateway) as page:
        await page.until("document.querySelectorAll('.waterfall i').length === 3")
        for width in (320, 700, 1000, 1700):
            await page.resize(width, 800)
            await page.until(f"innerWidth === {width}")
            await page.until(
                "document.querySelector('.uplot').offsetWidth <= document.querySelector('.plot').offsetWidth"
            )
            assert await page.run("document.documentElement.scrollWidth") <= width


async def test_a_role_switch_asks_first_and_is_sent(browser: Browser, gateway: Served) -> None:
    async with shown(browser, gateway) as page:
        button = "document.querySelector('[aria-label=\"Role of 10.0.0.3:30002…\"]')"
        await page.run(f"{button}.click()")
        assert ("dialog", "Role of 10.0.0.3:30002") in await page.names()
        await page.press("Escape")
        assert not await page.run("document.getElementById('dialog').open")
        assert gateway.bench.dispatcher.commands == []
        await page.run(f"{button}.click(); document.querySelector('dialog input[value=prefill]').click()")
        await page.run("document.querySelector('dialog .strong').click()")
        await page.until(text_of("#notice"), lambda text: "is switching to prefill" in text)
        assert gateway.bench.dispatcher.commands == [SetRole(call_id="", role=Role.PREFILL)]


async def test_a_drain_asks_first_and_then_drains(browser: Browser, gateway: Served) -> None:
    """The last test of this file: the gateway drains from here on."""
    async with shown(browser, gateway) as page:
        await page.run("document.querySelector('.drain').click()")
        assert await page.run("document.activeElement.textContent") == "Cancel"
        assert "0 requests are open" in await page.run(text_of("dialog"))
        await page.press("Enter")
        assert not await page.run("document.getElementById('dialog').open")
        assert gateway.bench.dispatcher.ready()
        assert "ready" in await page.run(text_of(".gateway .state"))
        await page.run("document.querySelector('.drain').click(); document.querySelector('dialog .strong').click()")
        await page.until(text_of(".gateway .state"), lambda text: text == "draining")
        assert await page.run("document.querySelector('.drain').disabled")
