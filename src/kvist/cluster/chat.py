"""One streamed chat answer over HTTP, measured as a client sees it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from kvist.clock import Clock
from kvist.errors import EngineError

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnReport:
    """What one turn cost. Times are the client's; pages and workers are what the response reports of itself."""

    text: str
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
    prefill_worker: str
    decode_worker: str


@dataclass(slots=True)
class _Seen:
    """What the events have said so far. Owned by one call of `stream_turn`."""

    text: str = ""
    first_s: float | None = None
    last_s: float = 0.0
    usage: Mapping[str, object] | None = None
    report: Mapping[str, object] | None = None


def stream_turn(
    client: httpx.Client, messages: Sequence[Message], *, max_tokens: int, clock: Clock, show: Callable[[str], None]
) -> TurnReport:
    """Greedy, so that every run tells the same. `show` gets each piece as it comes. Raises `EngineError`."""
    body = {
        "messages": list(messages),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "kvist": {"report": True, "usage": True},
    }
    seen = _Seen()
    start_s = clock.now_s()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise EngineError(f"the router answered {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                _take(seen, json.loads(line.removeprefix("data: ")), clock.now_s(), show)
    return _report(seen, start_s)


def _take(seen: _Seen, event: Mapping[str, object], now_s: float, show: Callable[[str], None]) -> None:
    if "error" in event:
        raise EngineError(f"the stream broke off: {event['error']}")
    seen.usage = _table(event, "usage") or seen.usage
    seen.report = _table(event, "kvist") or seen.report
    choices = event.get("choices")
    if isinstance(choices, list) and choices:
        piece = choices[0]["delta"].get("content")
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


def _report(seen: _Seen, start_s: float) -> TurnReport:
    if seen.first_s is None or seen.usage is None or seen.report is None:
        raise EngineError("the answer was empty, or came without usage and report")
    num_output_tokens = int(_number(seen.usage, "completion_tokens"))
    handoff = _table(seen.report, "handoff")
    by_tier = _table(_table(seen.usage, "kvist"), "cached_tokens")
    return TurnReport(
        text=seen.text,
        ttft_s=seen.first_s - start_s,
        tpot_s=(seen.last_s - seen.first_s) / (num_output_tokens - 1) if num_output_tokens > 1 else None,
        num_prompt_tokens=int(_number(seen.usage, "prompt_tokens")),
        num_cached_tokens=int(_number(_table(seen.usage, "prompt_tokens_details"), "cached_tokens")),
        num_cached_by_tier={tier: int(_number(by_tier, tier)) for tier in by_tier},
        num_output_tokens=num_output_tokens,
        num_pages=int(_number(handoff, "num_pages")),
        num_pages_reused=int(_number(handoff, "num_pages_reused")),
        num_bytes=int(_number(handoff, "num_bytes")),
        handoff_s=_number(handoff, "duration_ms") / 1e3,
        handoff_wait_s=_number(handoff, "wait_ms") / 1e3,
        prefill_worker=str(seen.report.get("prefill_worker")),
        decode_worker=str(seen.report.get("decode_worker")),
    )
