"""The requests under way, and the last ones that ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from kvist.flight.flight import Flight
from kvist.flight.records import RequestRecord


class Exporter(Protocol):
    """Sends records to a tracing system (tracing/)."""

    def begin(self, flight: Flight) -> None:
        """Begin the trace of a request; may set `flight.trace_id`."""

    def end(self, flight: Flight, record: RequestRecord) -> None: ...


class FlightLog:
    """Mutable; used by the event loop of one gateway. Its size is bounded by `--request-log-size` and by the requests
    that the gateway admits at once."""

    def __init__(self, size: int, exporter: Exporter | None = None) -> None:
        """`size`: records of ended requests that are kept."""
        self._ended: deque[RequestRecord] = deque(maxlen=size)
        self._open: dict[Flight, None] = {}
        self._exporter = exporter

    @property
    def is_on(self) -> bool:
        """Whether anybody reads the records."""
        return self._exporter is not None or self._ended.maxlen != 0

    def begin(self, flight: Flight) -> None:
        self._open[flight] = None
        if self._exporter is not None:
            self._exporter.begin(flight)

    def end(self, flight: Flight) -> None:
        del self._open[flight]
        flight.has_ended = True
        record = flight.record()
        self._ended.append(record)
        if self._exporter is not None:
            self._exporter.end(flight, record)

    def records(self) -> Iterator[RequestRecord]:
        """Yield the records: first of the requests under way, then of the others, the newest first."""
        yield from (flight.record() for flight in reversed(self._open))
        yield from reversed(self._ended)

    def find(self, name: str) -> RequestRecord | None:
        """Return the newest record with this request id or response id."""
        return next((each for each in self.records() if name in (each.id, each.response_id)), None)
