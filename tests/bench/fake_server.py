"""A tiny OpenAI-compatible server on a real socket, which fails in the ways a test sets. Runs in its own thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Behaviour:
    """How to answer one request. The default is to answer well."""

    status: int = 200
    num_extra_tokens: int = 0  # added to the requested number; may be negative
    num_extra_prompt_tokens: int = 0
    cached_tokens: int | None = 0
    cached_by_tier: dict[str, int] | None = None  # reported on request
    report: dict[str, object] | None = None  # the field `kvist` of the last event, on request
    pause_s: float = 0.0  # before the last token
    die_before_byte: bool = False
    cut_after_events: int | None = None
    never_answer: bool = False
    usage: bool = True
    done: bool = True
    instead: bytes | None = None  # the whole body of the stream
    close_header: bool = False
    until_eof: bool = False  # no framing: the end of the connection ends the body
    split_bytes: int | None = None  # write the body in pieces of this size
    pace_s: float = 0.0
    until_in_flight: int = 0  # answer only after this many requests have been open at once
    error_body: bytes = b'{"error": {"message": "later"}}'
    knows_ids: bool = True


@dataclass
class ReceivedRequest:
    body: dict[str, object]
    connection: int
    nth_on_connection: int
    behaviour: Behaviour
    head: str


@dataclass
class FakeServer:
    """Each completion request takes the next of `behaviours`, then `default`. All requests are kept in `received`."""

    behaviours: list[Behaviour] = field(default_factory=list)
    default: Behaviour = field(default_factory=Behaviour)
    received: list[ReceivedRequest] = field(default_factory=list)
    model: dict[str, str] = field(default_factory=lambda: {"id": "fake"})
    num_connections: int = 0
    max_in_flight: int = 0
    port: int = 0
    _in_flight: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def prompts(self) -> list[list[int]]:
        return [request.body["prompt"] for request in self.received]  # type: ignore[misc]

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        connection, nth = self.num_connections, 0
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                if head.startswith("GET"):
                    body = json.dumps({"data": [self.model]}).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                    continue
                length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
                nth += 1
                behaviour = self.behaviours.pop(0) if self.behaviours else self.default
                body_json = json.loads(await reader.readexactly(length))
                request = ReceivedRequest(body_json, connection, nth, behaviour, head)
                self.received.append(request)
                self._in_flight += 1
                self.max_in_flight = max(self.max_in_flight, self._in_flight)
                try:
                    keep = await self._answer(request, writer)
                finally:
                    self._in_flight -= 1
                if not keep:
                    break
        writer.transport.abort()

    async def _answer(self, request: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        behaviour = request.behaviour
        if behaviour.never_answer:
            await asyncio.Event().wait()
        if behaviour.die_before_byte:
            return False
        while self.max_in_flight < behaviour.until_in_flight:
            await asyncio.sleep(0.001)
        if behaviour.status != 200:
            head = f"HTTP/1.1 {behaviour.status} No\r\nContent-Length: {len(behaviour.error_body)}\r\n\r\n"
            writer.write(head.encode() + behaviour.error_body)
            await writer.drain()
            return True
        framing = "" if behaviour.until_eof else "Transfer-Encoding: chunked\r\n"
        closing = "Connection: close\r\n" if behaviour.close_header else ""
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{framing}{closing}\r\n".encode())
        for number, event in enumerate(events(request)):
            if number == behaviour.cut_after_events:
                await writer.drain()
                return False
            step = behaviour.split_bytes or len(event)
            for start in range(0, len(event), step):
                piece = event[start : start + step]
                writer.write(piece if behaviour.until_eof else b"%x\r\n%s\r\n" % (len(piece), piece))
                if behaviour.split_bytes:
                    await writer.drain()
            if behaviour.pause_s and number == int(str(request.body["max_tokens"])) - 2:
                await writer.drain()
                await asyncio.sleep(behaviour.pause_s)
            if behaviour.pace_s:
                await asyncio.sleep(behaviour.pace_s)
        if not behaviour.until_eof:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        if behaviour.until_eof:
            writer.close()
            await writer.wait_closed()
        return not (behaviour.close_header or behaviour.until_eof)


def answer_ids(prompt: list[int], count: int) -> list[int]:
    """Return the answer of the fake model, a function of the prompt alone."""
    return [(sum(prompt) + position) % 1000 + 5 for position in range(count)]


def events(request: ReceivedRequest) -> list[bytes]:
    behaviour, body = request.behaviour, request.body
    if behaviour.instead is not None:
        return [behaviour.instead]
    prompt = body["prompt"]
    assert isinstance(prompt, list)
    count = int(str(body["max_tokens"])) + behaviour.num_extra_tokens
    found = []
    for token_id in answer_ids(prompt, count):
        choice: dict[str, object] = {"index": 0, "text": "x", "finish_reason": None}
        if body.get("return_token_ids") and behaviour.knows_ids:
            choice["token_ids"] = [token_id]
        found.append(b"data: " + json.dumps({"id": "c", "choices": [choice], "usage": None}).encode() + b"\n\n")
    if behaviour.usage:
        usage: dict[str, object] = {
            "prompt_tokens": len(prompt) + behaviour.num_extra_prompt_tokens,
            "completion_tokens": count,
            "prompt_tokens_details": None
            if behaviour.cached_tokens is None
            else {"cached_tokens": behaviour.cached_tokens},
        }
        ours = body.get("kvist", {})
        assert isinstance(ours, dict)
        if ours.get("usage"):
            usage["kvist"] = {"cached_tokens": behaviour.cached_by_tier}
        last: dict[str, object] = {"id": "c", "choices": [], "usage": usage}
        if ours.get("report"):
            last["kvist"] = behaviour.report
        found.append(b"data: " + json.dumps(last).encode() + b"\n\n")
    if behaviour.done:
        found.append(b"data: [DONE]\n\n")
    return found


@contextlib.contextmanager
def running() -> Iterator[FakeServer]:
    server, ready = FakeServer(), threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def run() -> None:
        task = loop.create_task(server.serve(ready, stop))
        loop.run_until_complete(task)
        for left in asyncio.all_tasks(loop):
            left.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        assert not thread.is_alive()
