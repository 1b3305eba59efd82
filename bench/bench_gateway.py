"""How many tokens a second does the gateway alone stream on one core?

    python bench/bench_gateway.py [--streams 32] [--tokens 500] [--rounds 3] [--offered 0] [--engines 1] [--json FILE]

Processes: fake engines with the real wire protocol that answer at once, one token a stream a step; the gateway
(real dispatcher, tokenizer, HTTP server); clients that read server-sent events over real sockets. Reported per round:
tokens a second of wall time, and of the gateway's own CPU time, which is the throughput of one free core.

`--offered N` limits the engines to N tokens a second in all. With 0 there is no limit, and tokens that wait
together leave in one event. The baseline, measured in the same run, is the same number of chunks written by
a bare ASGI application on the same server: the cost of HTTP alone. "unrecorded" is the same gateway with
`--request-log-size 0`: the difference is the cost of the flight recorder. `--json` writes {commit, hardware, settings,
rows}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import msgspec

from json_report import write_report
from kvist.request import EpochId, WorkerId
from kvist.testing.specs import make_roomy_spec
from kvist.wire import EngineHealth

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


PROMISED_TOKENS_PER_S = 15_000
WHAT = ("baseline", "gateway", "unrecorded")
HOST = "127.0.0.1"
VOCAB_SIZE = 49152
CLUSTER_KEY = "of the processes of this benchmark"
WORDS = "The capital of France is Paris, and it has been so since 987. "


# ---------------------------------------------------------------- the engine's process


def run_engine(offered_tokens_per_s: float, number: int) -> None:
    from kvist.checkpoint import find_checkpoint
    from kvist.testing.fake_engine import FakeEngine
    from kvist.text import load_tokenizer

    tokens = load_tokenizer(find_checkpoint(None)).encode(WORDS)
    engine = FakeEngine(
        spec=make_roomy_spec(vocab_size=VOCAB_SIZE, worker_id=WorkerId(f"w{number}"), epoch=EpochId(f"e{number}")),
        cluster_key=CLUSTER_KEY,
        token_at=lambda _request, position: tokens[position % len(tokens)],
        max_tokens_per_s=offered_tokens_per_s or None,
    )
    print(engine.channel.endpoint, flush=True)
    engine.run()


# ---------------------------------------------------------------- the gateway's process


class _Hosts(httpx.AsyncBaseTransport):
    """Answers the discovery of engine N, at http://wN:1."""

    def __init__(self, endpoints: Sequence[str]) -> None:
        self._endpoints = endpoints

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        number = int(request.url.host.removeprefix("w"))
        spec = make_roomy_spec(
            vocab_size=VOCAB_SIZE,
            endpoint=self._endpoints[number],
            worker_id=WorkerId(f"w{number}"),
            epoch=EpochId(f"e{number}"),
        )
        body = {"engine": spec, "engine_health": EngineHealth()}
        return httpx.Response(200, content=msgspec.json.encode(body), request=request)


def run_gateway(endpoints: Sequence[str], port: int) -> None:
    from kvist.event_loop import run_in_loop
    from kvist.server.serve import http_server

    async def main() -> None:
        from kvist.channel import ChannelConfig
        from kvist.checkpoint import find_checkpoint
        from kvist.flight.flight_log import FlightLog
        from kvist.router import RouterConfig, WorkerUrls, build_router
        from kvist.server.app import build_app
        from kvist.server.config import ServerConfig
        from kvist.text import load_tokenizer

        config = ServerConfig(host=HOST, port=port)
        own = _Hosts(endpoints)
        channel = ChannelConfig(cluster_key=CLUSTER_KEY)
        router = RouterConfig(
            urls=WorkerUrls(worker_urls=tuple(f"http://w{number}:1" for number in range(len(endpoints))))
        )
        dispatcher = build_router(router, channel, transport=own).dispatcher
        await dispatcher.start()
        tokenizer = load_tokenizer(find_checkpoint(None))
        app, unrecorded = (
            build_app(
                dispatcher=dispatcher, tokenizer=tokenizer, config=config, model_name="fake", flights=FlightLog(size)
            )
            for size in (1000, 0)
        )
        try:
            await http_server(with_baseline(app, unrecorded), app.traffic, config).serve()
        finally:
            await dispatcher.close()

    run_in_loop(main())


def with_baseline(app: ASGIApp, unrecorded: ASGIApp) -> ASGIApp:
    """Wrap `app`: /baseline/N writes N chunks of the size of an event, with one send each; /unrecorded/PATH is PATH of
    the other application."""
    body = b'data: {"id":"chatcmpl-' + b"x" * 160 + b'"}\n\n'

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        if path.startswith("/unrecorded/"):
            await unrecorded({**scope, "path": path.removeprefix("/unrecorded")}, receive, send)
            return
        if not path.startswith("/baseline/"):
            await app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(int(path.rsplit("/", 1)[1])):
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.sleep(0)  # as a stream that waits for its next token does
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return outer


# ---------------------------------------------------------------- the clients


async def exchange(port: int, request: bytes) -> bytes:
    """Do one HTTP/1.1 exchange; return the response bytes, chunk framing included."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 20)
    writer.write(request)
    received = deque[bytes]()
    while piece := await reader.read(1 << 18):
        received.append(piece)
    writer.close()
    return b"".join(received)


def chat_request(num_tokens: int, prefix: str = "") -> bytes:
    body = json.dumps(
        {
            "model": "fake",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": num_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST {prefix}/v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        "Connection: close\r\nContent-Type: application/json\r\n"
    )
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def baseline_request(num_chunks: int) -> bytes:
    return f"GET /baseline/{num_chunks} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


def check_answer(answer: bytes, num_tokens: int) -> None:
    text = answer.decode()
    assert text.startswith("HTTP/1.1 200"), text[:400]
    assert "data: [DONE]" in text, "the stream was cut off"
    assert f'"completion_tokens":{num_tokens},' in text, "the usage does not count the requested tokens"


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def one_round(gateway_pid: int, port: int, what: str, num_streams: int, num_tokens: int) -> dict[str, object]:
    prefix = "" if what == "gateway" else "/unrecorded"
    request = baseline_request(num_tokens) if what == "baseline" else chat_request(num_tokens, prefix)
    cpu_before_s, start_s = cpu_s(gateway_pid), time.perf_counter()
    answers = await asyncio.gather(*(exchange(port, request) for _ in range(num_streams)))
    wall_s, used_s = time.perf_counter() - start_s, cpu_s(gateway_pid) - cpu_before_s
    num_events = sum(answer.count(b"data: ") for answer in answers)
    if what != "baseline":
        for answer in answers:
            check_answer(answer, num_tokens)
    total = num_streams * num_tokens
    return {
        "what": what,
        "num_tokens": total,
        "num_events": num_events,
        "wall_s": wall_s,
        "gateway_cpu_s": used_s,
        "tokens_per_wall_s": total / wall_s,
        "tokens_per_gateway_cpu_s": total / max(used_s, 0.01),
    }


async def wait_until_ready(port: int, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    request = b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    while time.monotonic() < deadline_s:
        try:
            if (await exchange(port, request)).startswith(b"HTTP/1.1 200"):
                return
        except OSError:
            pass
        await asyncio.sleep(0.1)
    raise SystemExit("the gateway did not become ready")


# ---------------------------------------------------------------- the whole


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


async def measure(args: argparse.Namespace, gateway_pid: int, port: int) -> list[dict[str, object]]:
    await wait_until_ready(port)
    await one_round(gateway_pid, port, "gateway", 4, 50)  # warm caches
    rows = []
    for _ in range(args.rounds):
        for what in WHAT:
            rows.append(await one_round(gateway_pid, port, what, args.streams, args.tokens))
    return rows


def report(rows: list[dict[str, object]]) -> None:
    for what in WHAT:
        mine = [row for row in rows if row["what"] == what]
        by_cpu = statistics.median(float(str(row["tokens_per_gateway_cpu_s"])) for row in mine)
        by_wall = statistics.median(float(str(row["tokens_per_wall_s"])) for row in mine)
        share = statistics.median(int(str(row["num_tokens"])) / int(str(row["num_events"])) for row in mine)
        print(
            f"{what:10} {by_cpu:10,.0f} tokens per CPU-second {by_wall:10,.0f} per second {share:6.2f} tokens per event"
        )
    print(f"promised: {PROMISED_TOKENS_PER_S:,} tokens/s on one core")


def main() -> None:
    if sys.argv[1:2] == ["engine"]:
        return run_engine(float(sys.argv[2]), int(sys.argv[3]))
    if sys.argv[1:2] == ["gateway"]:
        return run_gateway(sys.argv[3:], int(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=500, help="tokens a stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--offered", type=float, default=0.0, help="tokens a second of all engines; 0: no limit")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    engines = [start("engine", str(args.offered / args.engines), str(number)) for number in range(args.engines)]
    endpoints = [engine.stdout.readline().strip() for engine in engines if engine.stdout is not None]
    port = free_port()
    gateway = start("gateway", str(port), *endpoints)
    try:
        rows = asyncio.run(measure(args, gateway.pid, port))
    finally:
        for process in (gateway, *engines):
            process.terminate()
            process.wait(timeout=20)
    report(rows)
    if args.json:
        write_report(args.json, args, rows=rows)
    return None


if __name__ == "__main__":
    main()
