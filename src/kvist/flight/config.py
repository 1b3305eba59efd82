"""The options of the flight recorder."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class FlightOptions:
    request_log_size: int = option(
        1000,
        "number of ended requests whose stages GET /requests shows; 0 records none",
        unit="requests",
        minimum=0,
        maximum=100_000,
    )
