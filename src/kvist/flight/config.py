"""The options of the flight recorder."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from kvist.config import option
from kvist.errors import ConfigError

_SCHEMES = ("http", "https")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlightOptions:
    """Raises `ConfigError`."""

    request_log_size: int = option(
        1000,
        "number of ended requests whose stages GET /requests shows; 0 records none",
        unit="requests",
        minimum=0,
        maximum=100_000,
    )
    otlp_traces_endpoint: str | None = option(
        None,
        "URL of an OpenTelemetry collector that gets the stages of requests as spans, by OTLP over HTTP: "
        "http://HOST:4318/v1/traces; needs kvist[otel]",
    )

    def __post_init__(self) -> None:
        if self.otlp_traces_endpoint is not None and urlsplit(self.otlp_traces_endpoint).scheme not in _SCHEMES:
            raise ConfigError(
                f"--otlp-traces-endpoint {self.otlp_traces_endpoint} is not an HTTP URL; collectors listen on "
                "http://HOST:4318/v1/traces",
                param="otlp_traces_endpoint",
            )
