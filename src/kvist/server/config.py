"""Settings of the gateway's HTTP side."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kvist.config import check_api_key, option
from kvist.errors import ConfigError
from kvist.fairness import MAX_WEIGHT
from kvist.http.encoding import BodyLimits

TENANT_NONE, TENANT_API_KEY = "none", "api-key"


class StreamForm(enum.Enum):
    """Which contents of earlier events an event of a /generate stream repeats."""

    TEXT = "text"  # text and ids, not logprobs
    CUMULATIVE = "cumulative"  # everything: SGLang's form
    INCREMENTAL = "incremental"  # nothing: SGLang's form with --incremental-streaming-output


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    host: str = option("127.0.0.1", "address to listen on; anything but loopback should have --api-key")
    port: int = option(30000, "port to listen on", minimum=0, maximum=65535)
    api_key: tuple[str, ...] = option(
        (),
        "one or several keys, separated by spaces or commas; clients must send one of them as 'Authorization: Bearer "
        "KEY' or 'x-api-key: KEY', except to /, /health, /ready, /docs and /openapi.json. A router sends the first one "
        "to its workers. Other users can read a command line: KVIST_API_KEY is safer",
        secret=True,
    )
    api_key_weights: tuple[int, ...] = option(
        (),
        "weights of the API keys, in the order of --api-key: while requests wait, a key of weight 4 gets four turns "
        "and four places for one of a key of weight 1. By default all weights are 1",
        minimum=1,
        maximum=MAX_WEIGHT,
    )
    max_inflight_per_key: int | None = option(
        None,
        "maximum number of answers generated at once for one API key; further requests of the key get 429. By default "
        "only --max-concurrent-requests and the key's share of it are limits",
        minimum=1,
    )
    tenant_by: str = option(
        TENANT_NONE,
        "which requests share cached prefixes: all requests with the same cache_salt (none), or only requests that "
        "also have the same API key (api-key)",
        choices=(TENANT_NONE, TENANT_API_KEY),
    )
    allowed_origins: tuple[str, ...] = option(
        (),
        "origins of the web pages that may use this server, as https://HOST[:PORT]; * allows all. By default, "
        "browsers do not let pages of other origins read responses",
    )
    access_log: bool = option(
        True,
        "log one line for each HTTP request; polls (/health, /ready, /server_info, /metrics) only at --log-level debug",
    )
    max_connections: int = option(
        2048, "maximum number of open HTTP connections; further ones get 503 and are closed", minimum=1
    )
    header_timeout_s: float = option(
        30.0, "maximum time for the header of a request to arrive; slower requests get 408", unit="s", minimum=0.001
    )
    max_body_bytes: int = option(8 << 20, "maximum size of a request body", unit="bytes", minimum=1024)
    max_total_body_bytes: int = option(
        256 << 20,
        "maximum bytes of all request bodies in memory, while they are read and tokenised, not counting the first "
        "64 KiB of each; further requests get 429",
        unit="bytes",
        minimum=1024,
    )
    body_timeout_s: float = option(
        60.0, "maximum time for the body of a request to arrive; slower requests get 408", unit="s", minimum=0.001
    )
    tokenizer_threads: int = option(
        2,
        "threads that tokenise long prompts, render chat templates and decode large bodies",
        aliases=("tokenizer-worker-num",),
        minimum=1,
        maximum=64,
    )
    max_concurrent_requests: int = option(
        1024,
        "maximum number of answers generated at once (a request with n=4 counts four times); further requests get "
        "429. The last eighth of the places is reserved for callers below their fair share",
        minimum=1,
    )
    max_choices: int = option(128, "maximum number of answers per request (its prompts times n)", minimum=1)
    request_timeout_s: float = option(600.0, "maximum duration of one request", unit="s", minimum=0.001)
    shutdown_timeout_s: float = option(
        10.0,
        "on shutdown, how long open requests may continue before they end with an error; a second signal ends them "
        "at once",
        unit="s",
        minimum=0,
        aliases=("drain-timeout-s",),
    )
    drain_grace_s: float = option(
        0.0,
        "on shutdown, minimum time for which the port still answers (/ready with 503), so that a load balancer "
        "notices; 5 is usual in Kubernetes",
        unit="s",
        minimum=0,
    )
    incremental_streaming_output: bool = option(
        False,
        "each event of a /generate stream has only the new text, ids and logprobs; by default an event has the whole "
        "text and all ids so far, and only the new logprobs",
        aliases=("stream-output",),
    )
    cumulative_logprobs: bool = option(
        False,
        "each event of a /generate stream repeats all logprobs so far, as in SGLang; the size of such a stream grows "
        "with the square of its length",
    )

    def body_limits(self) -> BodyLimits:
        return BodyLimits(
            max_bytes=self.max_body_bytes,
            timeout_s=self.body_timeout_s,
            bytes_flag="--max-body-bytes",
            timeout_flag="--body-timeout-s",
        )

    def __post_init__(self) -> None:
        for key in self.api_key:
            check_api_key(key)
        if self.api_key_weights and len(self.api_key_weights) != len(self.api_key):
            raise ConfigError(
                f"--api-key-weights has {len(self.api_key_weights)} weights for {len(self.api_key)} API keys: give one "
                "weight for each --api-key, in the same order",
                param="api_key_weights",
            )
        if self.max_inflight_per_key is not None and not self.api_key:
            raise ConfigError(
                "--max-inflight-per-key needs API keys, and no key is set: add --api-key, or limit all callers "
                "together with --max-concurrent-requests",
                param="max_inflight_per_key",
            )
        if self.tenant_by == TENANT_API_KEY and not self.api_key:
            raise ConfigError(
                "--tenant-by api-key needs an API key to identify tenants, and no key is set: add --api-key",
                param="tenant_by",
            )
        if self.incremental_streaming_output and self.cumulative_logprobs:
            raise ConfigError(
                "--incremental-streaming-output and --cumulative-logprobs contradict each other: set only one of them",
                param="cumulative_logprobs",
            )
        for origin in self.allowed_origins:
            _check_origin(origin)

    @property
    def stream_form(self) -> StreamForm:
        if self.incremental_streaming_output:
            return StreamForm.INCREMENTAL
        return StreamForm.CUMULATIVE if self.cumulative_logprobs else StreamForm.TEXT


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """Raises `ConfigError` unless both files are given, or none."""

    ssl_certfile: Path | None = option(None, "PEM file with the certificate chain; serves HTTPS instead of HTTP")
    ssl_keyfile: Path | None = option(None, "PEM file with the private key of --ssl-certfile, without a password")

    def __post_init__(self) -> None:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("--ssl-certfile and --ssl-keyfile need each other: set both", param="ssl_certfile")

    @property
    def scheme(self) -> str:
        return "http" if self.ssl_certfile is None else "https"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceOptions:
    instance_id: str | None = option(
        None, "name in /health and /ready, by which a supervisor recognizes this server on its port"
    )


def _check_origin(origin: str) -> None:
    parts = urlsplit(origin)
    exact = parts.scheme in ("http", "https") and parts.hostname and origin == f"{parts.scheme}://{parts.netloc}"
    if origin != "*" and not exact:
        raise ConfigError(
            f"--allowed-origins: {origin!r} is not an origin; use https://HOST or https://HOST:PORT, or * for all",
            param="allowed_origins",
        )
