"""`kvist master` passes on to its program whole bodies of a bounded size that arrive in time."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.types import Message

from kvist.errors import BodyTooLarge, SlowBody
from kvist.http.asgi import ClientDisconnected
from kvist.nodes import master
from kvist.nodes.config import MasterAddress, PoolOptions
from kvist.nodes.master import BODY_LIMITS, MasterNode


class Proxy:
    """A master whose program answers with what it has received."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.node = MasterNode(Path("/bin/true"), MasterAddress(), PoolOptions())
        self.node._http = httpx.AsyncClient(base_url="http://127.0.0.1", transport=httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(request.content)
        return httpx.Response(200, json={})

    async def post(self, messages: AsyncIterator[Message]) -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"method": "POST", "path": "/api/v1/drain_jobs", "query_string": b"", "headers": []}
        await self.node._pass_on(scope, messages.__anext__, send)
        return sent


@pytest.fixture
def proxy() -> Proxy:
    return Proxy()


async def pieces(*contents: bytes, then: str = "") -> AsyncIterator[Message]:
    for index, content in enumerate(contents):
        yield {"type": "http.request", "body": content, "more_body": bool(then) or index + 1 < len(contents)}
    if then == "gone":
        yield {"type": "http.disconnect"}
    await asyncio.sleep(60)


async def test_a_body_in_pieces_is_passed_on_whole(proxy: Proxy) -> None:
    sent = await proxy.post(pieces(b"one ", b"two"))
    assert proxy.bodies == [b"one two"]
    assert sent[0]["status"] == httpx.codes.OK


async def test_half_a_body_is_not_passed_on_when_its_client_leaves(proxy: Proxy) -> None:
    with pytest.raises(ClientDisconnected):
        await proxy.post(pieces(b"half", then="gone"))
    assert not proxy.bodies


async def test_errors_about_a_body_name_no_flag_that_the_master_lacks(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BodyTooLarge, match=r"65536 bytes$"):
        await proxy.post(pieces(b"x" * BODY_LIMITS.max_bytes, b"x"))
    monkeypatch.setattr(master, "BODY_LIMITS", dataclasses.replace(BODY_LIMITS, timeout_s=0.01))
    with pytest.raises(SlowBody, match=r"within 0\.01 s$"):
        await proxy.post(pieces(b"slow", then="silence"))
    assert not proxy.bodies
