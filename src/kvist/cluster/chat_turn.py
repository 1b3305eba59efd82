"""One turn of a chat over HTTP, streamed and measured as a client sees it: for `kvist chat` and `kvist demo`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from kvist.clock import Clock
from kvist.errors import EngineError

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnOptions:
    """The fields of a request besides the messages. None leaves a field to the server's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    model: str | None = None
    with_report: bool = True  # ask for the figures of Kvist; other servers refuse the field

    def body(self, messages: Sequence[Message]) -> dict[str, object]:
        fields: dict[str, object] = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            "kvist": {"report": True, "usage": True} if self.with_report else None,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnReport:
    """The figures of one turn: times measured by the client; pages and workers as reported in the response."""

    text: str
    finish_reason: str | None
    ttft_s: float
    tpot_s: float | None  # None: a single token
    num_prompt_tokens: int
    num_cached_tokens: int
    num_cached_by_tier: Mapping[str, int]  # "device", "host", "storage"; their sum is `num_cached_tokens`
    num_output_tokens: int
    num_pages: int
    num_pages_reused: int
    num_bytes: int
    handoff_s: float
    handoff_wait_s: float
    prefill_worker: str | None  # None: not reported by the server
    decode_worker: str | None


@dataclass(slots=True)
class _Seen:
    """The contents of the events so far. Mutable; owned by one call of `stream_turn`."""

    text: str = ""
    finish_reason: str | None = None
    first_s: float | None = None
    last_s: float = 0.0
    usage: Mapping[str, object] | None = None
    report: Mapping[str, object] | None = None


def stream_turn(
    client: httpx.Client,
    messages: Sequence[Message],
    options: TurnOptions,
    *,
    clock: Clock,
    show: Callable[[str], None],
) -> TurnReport:
    """Send one request and return its figures. `show` is called with each piece of the answer. Raises `EngineError`."""
    seen = _Seen()
    start_s = clock.now_s()
    with client.stream("POST", "/v1/chat/completions", json=options.body(messages)) as response:
        if response.status_code != httpx.codes.OK:
            raise EngineError(f"the server answered {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                _take(seen, json.loads(line.removeprefix("data: ")), clock.now_s(), show)
    if seen.usage is None or (options.with_report and seen.report is None):
        raise EngineError("the answer has no usage or no report")
    return _report(seen, start_s, clock.now_s())


def _take(seen: _Seen, event: Mapping[str, object], now_s: float, show: Callable[[str], None]) -> None:
    if "error" in event:
        raise EngineError(f"the stream broke off: {event['error']}")
    seen.usage = _table(event, "usage") or seen.usage
    seen.report = _table(event, "kvist") or seen.report
    choices = event.get("choices")
    if isinstance(choices, list) and choices:
        piece = choices[0]["delta"].get("content")
        seen.finish_reason = choices[0].get("finish_reason") or seen.finish_reason
        if piece:
            seen.first_s = now_s if seen.first_s is None else seen.first_s
            seen.last_s = now_s
            seen.text += piece
            show(piece)


def _table(value: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _number(value: Mapping[str, object], key: str) -> float:
    found = value.get(key)
    return float(found) if isinstance(found, int | float) else 0.0


def _name(value: Mapping[str, object], key: str) -> str | None:
    found = value.get(key)
    return found if isinstance(found, str) else None


def _report(seen: _Seen, start_s: float, end_s: float) -> TurnReport:
    usage, report = seen.usage or {}, seen.report or {}
    num_output_tokens = int(_number(usage, "completion_tokens"))
    handoff = _table(report, "handoff")
    by_tier = _table(_table(usage, "kvist"), "cached_tokens")
    first_s = end_s if seen.first_s is None else seen.first_s  # an answer may be empty
    return TurnReport(
        text=seen.text,
        finish_reason=seen.finish_reason,
        ttft_s=first_s - start_s,
        tpot_s=(seen.last_s - first_s) / (num_output_tokens - 1) if num_output_tokens > 1 and seen.text else None,
        num_prompt_tokens=int(_number(usage, "prompt_tokens")),
        num_cached_tokens=int(_number(_table(usage, "prompt_tokens_details"), "cached_tokens")),
        num_cached_by_tier={tier: int(_number(by_tier, tier)) for tier in by_tier},
        num_output_tokens=num_output_tokens,
        num_pages=int(_number(handoff, "num_pages")),
        num_pages_reused=int(_number(handoff, "num_pages_reused")),
        num_bytes=int(_number(handoff, "num_bytes")),
        handoff_s=_number(handoff, "duration_ms") / 1e3,
        handoff_wait_s=_number(handoff, "wait_ms") / 1e3,
        prefill_worker=_name(report, "prefill_worker"),
        decode_worker=_name(report, "decode_worker"),
    )
