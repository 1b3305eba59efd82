"""The options of `kvist bench`. The defaults are the scenarios of docs/bench.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from kvist.bench.goodput import CHAT, LONG, parse_limits
from kvist.config import check_api_key, option
from kvist.errors import ConfigError

SERVER, DRAWN, AUTO = "server", "drawn", "auto"
MIXED_REQUESTS = 120  # unless given
RESERVED_FIELDS = (
    "model",
    "prompt",
    "max_tokens",
    "ignore_eos",
    "stream",
    "stream_options",
    "kvist",
    "return_token_ids",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthRange:
    """Lengths from `low` to `high`, both included."""

    low: int
    high: int


def parse_length_range(text: str, param: str) -> LengthRange:
    """Parse "128" or "100-1024". Raises `ConfigError`."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        flag = "--" + param.replace("_", "-")
        raise ConfigError(f"{flag}: {text!r} is not allowed; use N or LOW-HIGH, with at least 1 token", param=param)
    return LengthRange(low=low, high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetConfig:
    """The server, and the settings that all scenarios share. Raises `ConfigError`."""

    base_url: str = option(
        "http://127.0.0.1:30000",
        "URL of the server, with or without /v1 at the end",
    )
    model: str | None = option(None, "name of the model on that server; by default the first one in /v1/models")
    api_key: str | None = option(None, "key sent as a bearer token", secret=True)
    seed: int = option(0, "seed of the prompts, lengths, arrival times and turns", minimum=0)
    vocab_low: int = option(1000, "smallest token id of a prompt", minimum=0)
    vocab_high: int = option(30000, "largest token id of a prompt", minimum=0)
    warmup: int = option(
        4, "requests of the same lengths that are sent first and not measured", unit="requests", minimum=0
    )
    request_timeout_s: float = option(
        600.0, "time limit for one request; a slower request counts as failed", unit="s", minimum=0.001
    )
    extra_body: str | None = option(
        None, 'JSON object with more fields for each request, such as \'{"temperature": 0.8, "top_p": 0.95}\''
    )
    handoff_parts: bool = option(
        False,
        "ask Kvist for its report on each request: show why each route was chosen, and where the time between the "
        "first and the second token went",
    )
    json_path: Path | None = option(None, "file for the figures and one row for each request", flag="--json")
    plot: Path | None = option(None, "SVG file for a picture of the latencies, with those of --baseline in grey")
    baseline: Path | None = option(None, "an earlier --json file; ratios to its figures are printed")

    def __post_init__(self) -> None:
        if self.api_key is not None:
            check_api_key(self.api_key)
        if self.plot is not None and self.plot.suffix != ".svg":
            raise ConfigError(
                f"--plot {self.plot} is not the name of an SVG file: end it with .svg (browsers show and convert it)",
                param="plot",
            )
        if self.vocab_high < self.vocab_low:
            raise ConfigError("--vocab-high is below --vocab-low", param="vocab_high")
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"--base-url {self.base_url!r} must be http://HOST:PORT", param="base_url")
        _ = self.sampling_fields  # raises at start, not in the middle of a run

    @property
    def sampling_fields(self) -> dict[str, object]:
        """The fields of a request that the load does not set: greedy sampling, then `extra_body`."""
        return {"temperature": 0} | _parse_extra_body(self.extra_body)


def _parse_extra_body(text: str | None) -> dict[str, object]:
    if text is None:
        return {}
    try:
        fields: dict[str, object] = msgspec.json.decode(text, type=dict[str, object])
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(f"--extra-body must be a JSON object: {error}", param="extra_body") from None
    taken = sorted(set(fields) & set(RESERVED_FIELDS))
    if taken:
        raise ConfigError(
            f"--extra-body cannot set {', '.join(taken)}: the scenario sets it for each request", param="extra_body"
        )
    return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """The settings that every scenario has."""

    input_tokens: str
    output_tokens: str

    @property
    def input_range(self) -> LengthRange:
        return parse_length_range(self.input_tokens, "input_tokens")

    @property
    def output_range(self) -> LengthRange:
        return parse_length_range(self.output_tokens, "output_tokens")

    def __post_init__(self) -> None:
        _ = self.input_range, self.output_range  # raises at start, not in the middle of a run


def _lengths(default: str, what: str) -> str:
    return option(default, f"number of tokens of {what}: N, or LOW-HIGH for a number drawn uniformly")


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleConfig(_Load):
    requests: int = option(8, "number of requests, sent one after another", minimum=1)
    input_tokens: str = _lengths("128", "each prompt")
    output_tokens: str = _lengths("256", "each answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineConfig(_Load):
    requests: int = option(256, "total number of requests", minimum=1)
    parallel: int | None = option(
        None, "maximum number of requests in flight; by default all are sent at once", minimum=1
    )
    input_tokens: str = _lengths("100-1024", "each prompt")
    output_tokens: str = _lengths("100-1024", "each answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class RateConfig(_Load):
    requests: int = option(120, "total number of requests", minimum=1)
    rate: float = option(
        8.0,
        "mean number of requests per second; they are sent at random times (a Poisson process), without waiting for "
        "answers",
        unit="1/s",
        minimum=1e-3,
    )
    input_tokens: str = _lengths("2048", "each prompt")
    output_tokens: str = _lengths("128", "each answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedConfig(_Load):
    """Chats with long prompts among them."""

    requests: int | None = option(
        None, f"total number of requests; {MIXED_REQUESTS} unless --seconds is set", minimum=1
    )
    seconds: float | None = option(
        None, "instead of --requests: send all requests that arrive within this time", unit="s", minimum=0.001
    )
    rate: float = option(
        6.0,
        "mean number of requests per second; they are sent at random times (a Poisson process), without waiting for "
        "answers",
        unit="1/s",
        minimum=1e-3,
    )
    input_tokens: str = _lengths("512", "a chat's prompt")
    output_tokens: str = _lengths("256", "a chat's answer")
    long_every: int = option(4, "one request in this number is a long prompt; 0: none", minimum=0)
    long_input_tokens: str = _lengths("8192", "a long prompt")
    long_output_tokens: str = _lengths("128", "the answer to a long prompt")
    goodput: tuple[str, ...] = option(
        ("chat.ttft:500", "itl:25"),
        "limits in milliseconds that a good request keeps to: FIGURE:MS, or CLASS.FIGURE:MS for the class chat or long "
        "alone. Figures: ttft, tpot, itl (p99 of the request), gap (the largest ITL), e2el",
    )

    def __post_init__(self) -> None:
        if self.requests is not None and self.seconds is not None:
            raise ConfigError("--requests and --seconds contradict each other: give one of them", param="seconds")
        _ = self.input_range, self.output_range, self.long_input_range, self.long_output_range
        parse_limits(self.goodput)

    @property
    def long_input_range(self) -> LengthRange:
        return parse_length_range(self.long_input_tokens, "long_input_tokens")

    @property
    def long_output_range(self) -> LengthRange:
        return parse_length_range(self.long_output_tokens, "long_output_tokens")

    def class_of(self, index: int) -> str:
        """Return the class of a request by its index: the last of every `long_every` requests has a long prompt."""
        return LONG if self.long_every and index % self.long_every == self.long_every - 1 else CHAT


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiturnConfig(_Load):
    clients: int = option(80, "number of conversations", minimum=1)
    rounds: int = option(4, "number of turns of each conversation", minimum=1)
    parallel: int = option(16, "maximum number of requests in flight", minimum=1)
    page_size: int = option(
        16, "page size with which the highest possible hit rate is computed", unit="tokens", minimum=1
    )
    input_tokens: str = _lengths("2048", "each turn's new input")
    output_tokens: str = _lengths("64", "each answer")
    answers: str = option(
        AUTO,
        "source of the token ids that a conversation appends after each answer: server = the server, which must "
        "support return_token_ids; drawn = drawn by --seed, so their K/V cannot be cached; auto = the server if "
        "possible",
        choices=(AUTO, SERVER, DRAWN),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomConfig:
    file: Path = option(Path("bench.json"), "JSON file with a list of scenarios: see docs/bench.md")


Load = SingleConfig | OfflineConfig | RateConfig | MixedConfig | MultiturnConfig
LOADS: dict[str, type[Load]] = {
    "single": SingleConfig,
    "offline": OfflineConfig,
    "rate": RateConfig,
    "mixed": MixedConfig,
    "multiturn": MultiturnConfig,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    name: str  # in tables; a baseline's run is found by this name
    kind: str  # key of LOADS
    load: Load
