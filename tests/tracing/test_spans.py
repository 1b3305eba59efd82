"""Records of requests as OpenTelemetry spans: in memory, and at a collector over HTTP."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvist.errors import ConfigError, WorkerLost
from kvist.flight.config import FlightOptions
from kvist.flight.flight import Arrival, Flight, Progress
from kvist.flight.flight_log import FlightLog
from kvist.flight.records import CachedTokens
from kvist.flight.stages import StageTime
from kvist.flight.timeline import SentTo
from kvist.flight.trace_context import trace_context
from kvist.testing.gateway_bench import GatewayBench, gateway_bench
from kvist.tracing.spans import SpanExporter, flight_log, otlp_exporter

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PROGRESS = Progress(
    prompt_tokens=7,
    cached_tokens=CachedTokens(host=2),
    completion_tokens=3,
    first_token_s=2.0,
    finish_reason="stop",
    is_complete=True,
    workers=("p", "d"),
)


class Spans:
    """An exporter, and what it has exported."""

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._memory))
        self.exporter = SpanExporter(provider)

    def all(self) -> list[Any]:
        return sorted(self._memory.get_finished_spans(), key=lambda span: (span.start_time, -span.end_time))

    def tree(self) -> list[str]:
        """Return each span as PARENT/NAME, by its start."""
        names = {span.context.span_id: span.name for span in self.all()}
        return [f"{names.get(span.parent.span_id, '?') if span.parent else ''}/{span.name}" for span in self.all()]


@pytest.fixture
def spans() -> Spans:
    return Spans()


def arrival(traceparent: bytes | None = None) -> Arrival:
    return Arrival(
        request_id="r",
        response_id="chatcmpl-1",
        endpoint="/v1/chat/completions",
        model="m",
        received_s=0.0,
        received_unix_s=1_000_000.0,
        trace=trace_context(traceparent),
    )


def handed_over(log: FlightLog, traceparent: bytes | None = None) -> Flight:
    """Record a request that a pair of workers has served in five seconds."""
    flight = Flight(arrival(traceparent), lambda: 5.0, lambda: PROGRESS, 1)
    log.begin(flight)
    flight.reached("received", 0.5)
    timeline = flight.open_answer()
    timeline.on_submit(0.5, SentTo(prefill="p", decode="d"))
    timeline.lay([StageTime("queued", 0.5), StageTime("prefill", 1.0, "tokens 0 to 7")], 2.0, "p")
    timeline.token_s = 2.0
    timeline.lay([StageTime("handoff", 1.0)], 3.0, "d")
    timeline.token_s = 4.0
    flight.reached("sent")
    log.end(flight)
    return flight


def test_stages_of_gateway_and_workers_become_spans_of_one_trace(spans: Spans) -> None:
    flight = handed_over(FlightLog(0, spans.exporter), b"00-%s-%s-01" % (TRACE_ID.encode(), SPAN_ID.encode()))
    root = "POST /v1/chat/completions"
    assert spans.tree() == [
        f"?/{root}",
        f"{root}/received",
        f"{root}/worker p",
        "worker p/queued",
        "worker p/prefill",
        f"{root}/worker d",
        "worker d/handoff",
        "worker d/decode",
        f"{root}/sent",
    ]
    assert flight.trace_id == TRACE_ID
    assert {f"{span.context.trace_id:032x}" for span in spans.all()} == {TRACE_ID}
    first = spans.all()[0]
    assert f"{first.parent.span_id:016x}" == SPAN_ID
    assert first.attributes["gen_ai.usage.input_tokens"] == 7
    assert first.attributes["kvist.cached_tokens.host"] == 2
    assert (first.end_time - first.start_time) / 1e9 == pytest.approx(5.0)
    prefill = spans.all()[4]
    assert (prefill.start_time / 1e9, prefill.end_time / 1e9) == (1_000_001.0, 1_000_002.0)
    assert prefill.attributes["kvist.detail"] == "tokens 0 to 7"


def test_a_caller_that_samples_nothing_gets_no_spans(spans: Spans) -> None:
    flight = handed_over(FlightLog(0, spans.exporter), b"00-%s-%s-00" % (TRACE_ID.encode(), SPAN_ID.encode()))
    assert spans.all() == []
    assert flight.trace_id == TRACE_ID


def test_a_request_without_a_parent_begins_a_trace(spans: Spans) -> None:
    flight = handed_over(FlightLog(0, spans.exporter))
    assert spans.all()[0].parent is None
    assert flight.trace_id == f"{spans.all()[0].context.trace_id:032x}"


async def test_the_gateway_exports_a_failed_request_as_an_error(spans: Spans) -> None:
    bench: GatewayBench = gateway_bench(flights=FlightLog(10, spans.exporter))
    bench.dispatcher.error = WorkerLost("gone")
    async with bench.client:
        await bench.chat()
        [record] = (await bench.client.get("/requests")).json()["requests"]
    [root] = [span for span in spans.all() if span.parent is None]
    assert not root.status.is_ok
    assert root.attributes["error.type"] == "worker_lost"
    assert record["trace_id"] == f"{root.context.trace_id:032x}"


class Collector(BaseHTTPRequestHandler):
    """Takes one export."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((self.path, body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        del arguments


@pytest.fixture
def collector() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Collector)
    server.received = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(timeout=60)


async def test_a_collector_gets_the_spans_over_http(collector: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")  # ms until spans are sent
    host, port = collector.server_address[:2]
    log = flight_log(FlightOptions(otlp_traces_endpoint=f"http://{host!s}:{port}/v1/traces"))
    handed_over(log)
    received: list[tuple[str, bytes]] = collector.received  # type: ignore[attr-defined]
    async with asyncio.timeout(60):
        while not received:
            await asyncio.sleep(0.01)
    assert received[0][0] == "/v1/traces"
    assert b"worker p" in received[0][1]


def test_a_missing_sdk_and_a_wrong_endpoint_are_errors_that_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="http://HOST:4318"):
        FlightOptions(otlp_traces_endpoint="grpc://localhost:4317")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvist\[otel\]'"):
        otlp_exporter("http://localhost:4318/v1/traces")
