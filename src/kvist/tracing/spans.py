"""Exports records of requests as OpenTelemetry spans, with OTLP over HTTP (`pip install 'kvist[otel]'`).

    request (kind SERVER; its parent is the span of the request's `traceparent`)
    ├── received, tokenised, ...       stages of the gateway
    ├── worker W                       consecutive stages of one worker, whose times the gateway has placed
    │   └── queued, prefill, decode, ...
    └── sent

The SDK's own environment variables hold: OTEL_TRACES_SAMPLER (by default the caller's choice, else all),
OTEL_RESOURCE_ATTRIBUTES, OTEL_EXPORTER_OTLP_HEADERS. Spans wait in the SDK's bounded queue, and its thread sends them.
If a collector does not answer, spans are lost, which the SDK logs, and no request is delayed.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from kvist import __version__
from kvist.errors import ConfigError
from kvist.flight.config import FlightOptions
from kvist.flight.flight import Flight
from kvist.flight.flight_log import Exporter, FlightLog
from kvist.flight.records import RequestRecord, Stage, Status
from kvist.flight.timeline import GATEWAY
from kvist.flight.trace_context import TraceContext

_EXPORT_TIMEOUT_S = 5.0


def flight_log(options: FlightOptions) -> FlightLog:
    """Return the log of a gateway, with the exporter that the options ask for. Raises `ConfigError` without the
    OpenTelemetry SDK."""
    endpoint = options.otlp_traces_endpoint
    return FlightLog(options.request_log_size, None if endpoint is None else otlp_exporter(endpoint))


def otlp_exporter(endpoint: str) -> Exporter:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint needs the OpenTelemetry SDK ({error}): pip install 'kvist[otel]'",
            param="otlp_traces_endpoint",
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "kvist", "service.version": __version__}))
    provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S))  # ends with the process
    )
    return SpanExporter(provider)


class SpanExporter:
    """The exporter of a `FlightLog`. Mutable; used by the event loop."""

    def __init__(self, provider: Any) -> None:
        """`provider`: an OpenTelemetry `TracerProvider`."""
        from opentelemetry import trace

        self._trace = trace
        self._tracer = provider.get_tracer("kvist", __version__)
        self._open: dict[Flight, Any] = {}  # the span of each request under way

    def begin(self, flight: Flight) -> None:
        arrival = flight.arrival
        span = self._tracer.start_span(
            f"POST {arrival.endpoint}",
            context=None if arrival.trace is None else self._parent(arrival.trace),
            kind=self._trace.SpanKind.SERVER,
            start_time=_ns(arrival.received_unix_s),
            attributes={"http.route": arrival.endpoint, "kvist.request.id": arrival.request_id},
        )
        self._open[flight] = span
        flight.trace_id = f"{span.get_span_context().trace_id:032x}"

    def end(self, flight: Flight, record: RequestRecord) -> None:
        span = self._open.pop(flight)
        if not span.is_recording():
            return
        span.set_attributes(_attributes(record))
        if record.status is Status.FAILED:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, record.error))
        for where, stages in groupby(record.stages, key=lambda stage: stage.where):
            self._add(span, where, list(stages), record.received_unix_s)
        span.end(_ns(record.received_unix_s + record.duration_s))

    def _add(self, parent: Any, where: str, stages: list[Stage], received_s: float) -> None:
        """Add consecutive stages of one process as spans."""
        start_s, end_s = received_s + stages[0].start_s, received_s + stages[-1].start_s + stages[-1].duration_s
        worker = None
        if where != GATEWAY:
            name, attributes = f"worker {where}", {"kvist.worker": where}
            worker = parent = self._child(parent, name, start_s, attributes)
        for stage in stages:
            attributes = {"kvist.where": where} | ({} if stage.detail is None else {"kvist.detail": stage.detail})
            child = self._child(parent, stage.name, received_s + stage.start_s, attributes)
            child.end(_ns(received_s + stage.start_s + stage.duration_s))
        if worker is not None:
            worker.end(_ns(end_s))

    def _child(self, parent: Any, name: str, start_s: float, attributes: dict[str, str]) -> Any:
        context = self._trace.set_span_in_context(parent)
        return self._tracer.start_span(name, context=context, start_time=_ns(start_s), attributes=attributes)

    def _parent(self, found: TraceContext) -> Any:
        trace = self._trace
        state = trace.TraceState.from_header([found.state]) if found.state else None
        context = trace.SpanContext(
            trace_id=int(found.trace_id, 16),
            span_id=int(found.parent_id, 16),
            is_remote=True,
            trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED if found.is_sampled else 0),
            trace_state=state,
        )
        return trace.set_span_in_context(trace.NonRecordingSpan(context))


def _attributes(record: RequestRecord) -> dict[str, str | int | float]:
    """Return the attributes of a request, with OpenTelemetry's names for generative models where it has them."""
    cached = record.cached_tokens
    found: dict[str, str | int | float | None] = {
        "gen_ai.request.model": record.model,
        "gen_ai.response.id": record.response_id,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "kvist.status": record.status.value,
        "kvist.finish_reason": record.finish_reason,
        "kvist.ttft_s": record.ttft_s,
        "kvist.cached_tokens.device": cached.device,
        "kvist.cached_tokens.host": cached.host,
        "kvist.cached_tokens.storage": cached.storage,
        "error.type": record.error,
    }
    return {name: value for name, value in found.items() if value is not None}


def _ns(unix_s: float) -> int:
    return round(unix_s * 1e9)
