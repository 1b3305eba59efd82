"""Requests one completion, reads its server-sent events, and records the result in one `Row`.

All times are from the client's clock. A request begins before a connection is taken or opened. Its first token is the
first event that carries a choice. Its end is the end of the response. An answer succeeds only if its stream ended with
[DONE] and the server's usage counts exactly the requested tokens, in and out. Anything else is a failure with a kind,
and a failure is a row too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from kvist.clock import Clock
from kvist.errors import UNDECODABLE
from kvist.http_client import EventLines, HttpClient, HttpFailure

MAX_ERROR_BYTES = 64 << 10
PATH = "/v1/completions"
GREEDY: Mapping[str, object] = MappingProxyType({"temperature": 0})


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One request. A failed request has a `failure` and no times but `sent_s`."""

    index: int
    request_class: str | None = None  # mixed only: "chat" or "long"
    client: int | None = None  # of a conversation
    turn: int | None = None
    num_input: int  # requested
    num_output: int
    sent_s: float | None = None  # since the scenario's start; None: never sent
    late_s: float = 0.0  # delay from the planned time to the actual one
    ttft_s: float | None = None
    tpot_s: float | None = None  # None with one output token
    e2e_s: float | None = None
    num_prompt_tokens: int | None = None  # the server's counts
    num_cached_tokens: int | None = None
    num_cached_by_tier: dict[str, int] | None = None  # reported by Kvist servers only
    num_ceiling_tokens: int | None = None  # multiturn only: cached tokens if nothing were ever evicted
    num_output_tokens: int | None = None
    num_events: int = 0
    itl_p99_s: float | None = None  # of this stream
    max_gap_s: float | None = None  # the largest of its ITLs
    route: str | None = None  # why these workers; with --handoff-parts
    second_token_ms: dict[str, float | None] | None = None  # its parts, of a request that was handed over
    retried: bool = False
    failure: str | None = None  # the kind
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """One request to send. `prompt` is a JSON list of token ids."""

    prompt: bytes
    row: Row  # the fields known before sending
    wants_ids: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestResult:
    row: Row
    gaps_s: list[float] = field(default_factory=list)  # between events that carry tokens
    token_ids: list[int] = field(default_factory=list)  # if requested, and given by the server


# ---------------------------------------------------------------- the stream


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Tiers(msgspec.Struct):
    cached_tokens: dict[str, int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None
    kvist: _Tiers | None = None


class _Route(msgspec.Struct):
    reason: str | None = None


class _Handoff(msgspec.Struct):
    second_token: dict[str, float | None] | None = None


class _Report(msgspec.Struct):
    route: _Route | None = None
    handoff: _Handoff | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    kvist: _Report | None = None
    error: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Event).decode


class _StreamReader:
    """The state of one response. `on_body` is called with each piece of the body."""

    def __init__(self, clock: Clock) -> None:
        self._now_s = clock.now_s
        self._lines = EventLines()
        self._error_body = b""
        self.first_s: float | None = None
        self.last_s = 0.0
        self.gaps_s: list[float] = []
        self.token_ids: list[int] = []
        self.usage: _Usage | None = None
        self.report: _Report | None = None
        self.done = False

    def on_body(self, status: int, piece: bytes) -> None:
        if status != 200:
            self._error_body = (self._error_body + piece)[:MAX_ERROR_BYTES]
            return
        now_s = self._now_s()
        for name, content in self._lines.feed(piece):
            if content == b"[DONE]":
                self.done = True
            elif name == b"error":
                raise HttpFailure("error_event", _text(content))
            else:
                self._event(content, now_s)

    def _event(self, content: bytes, now_s: float) -> None:
        try:
            event = _decode(content)
        except UNDECODABLE as error:
            raise HttpFailure("bad_stream", f"{error} in event {_text(content)}") from error
        if event.error and bytes(event.error) != b"null":
            raise HttpFailure("error_event", _text(content))
        if event.usage is not None:
            self.usage = event.usage
        if event.kvist is not None:
            self.report = event.kvist
        if not event.choices:
            return
        if self.first_s is None:
            self.first_s = now_s
        else:
            self.gaps_s.append(now_s - self.last_s)
        self.last_s = now_s
        for choice in event.choices:
            if choice.token_ids:
                self.token_ids += choice.token_ids

    def failure(self, status: int, request: BenchRequest) -> tuple[str, str] | None:
        """Return kind and message of the failure, or None for a complete answer with the requested counts."""
        if status != 200:
            return f"http_{status}", _text(self._error_body)
        if not self.done:
            return "cut", "the stream ended without [DONE]"
        if self.first_s is None:
            return "empty", "the stream carried no token"
        if self.usage is None:
            return "no_usage", "the stream ended without usage: its tokens cannot be counted"
        got, wanted = self.usage.prompt_tokens, request.row.num_input
        if got != wanted:
            return "wrong_input_count", f"the server counted {got} prompt tokens, {wanted} were sent"
        got, wanted = self.usage.completion_tokens, request.row.num_output
        if got != wanted:
            return "wrong_output_count", f"the server counted {got} output tokens, {wanted} were requested"
        return None


def _text(content: bytes) -> str:
    return content[:300].decode("utf-8", "replace")


# ---------------------------------------------------------------- one request


class CompletionClient:
    """Sends completion requests for one model to one server; `by_tier` and `with_report` need Kvist."""

    def __init__(
        self,
        client: HttpClient,
        *,
        model: str,
        clock: Clock,
        timeout_s: float,
        sampling_fields: Mapping[str, object] = GREEDY,
        by_tier: bool = False,
        with_report: bool = False,
    ) -> None:
        self.client = client
        self._model = msgspec.json.encode(model)
        self._clock = clock
        self._timeout_s = timeout_s
        own_fields = {name: True for name, wanted in (("usage", by_tier), ("report", with_report)) if wanted}
        self._own_fields = b',"kvist":' + msgspec.json.encode(own_fields) if own_fields else b""
        self._sampling = msgspec.json.encode(dict(sampling_fields))[1:-1]

    def body(self, request: BenchRequest) -> bytes:
        """Return the request's JSON, built around a prompt that is JSON already."""
        return b"".join(
            (
                b'{"model":',
                self._model,
                b',"prompt":',
                request.prompt,
                b',"max_tokens":%d,"ignore_eos":true,"stream":true,' % request.row.num_output,
                self._sampling,
                b',"stream_options":{"include_usage":true}',
                self._own_fields,
                b',"return_token_ids":true}' if request.wants_ids else b"}",
            )
        )

    async def send(self, request: BenchRequest, *, start_s: float, planned_s: float | None = None) -> RequestResult:
        """Send a request; return its answer, also for a failure. `start_s` and `planned_s` are clock times."""
        body = self.body(request)
        reader = _StreamReader(self._clock)
        sent_s = self._clock.now_s()
        failure: tuple[str, str] | None
        retried = False
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await self.client.post(PATH, body, reader.on_body)
            retried = reply.retried
            failure = reader.failure(reply.status, request)
        except TimeoutError:
            failure = "timeout", f"no complete answer in {self._timeout_s:g} s"
        except HttpFailure as error:
            failure = error.kind, str(error)
        end_s = self._clock.now_s()
        late_s = 0.0 if planned_s is None else sent_s - planned_s
        row = replace(request.row, sent_s=sent_s - start_s, late_s=late_s, retried=retried)
        if failure is not None:
            return RequestResult(row=replace(row, failure=failure[0], message=failure[1]))
        return _succeeded(row, reader, sent_s, end_s)


def _succeeded(row: Row, reader: _StreamReader, sent_s: float, end_s: float) -> RequestResult:
    assert reader.first_s is not None
    assert reader.usage is not None
    num_output = reader.usage.completion_tokens
    details = reader.usage.prompt_tokens_details
    report = reader.report or _Report()
    whole = replace(
        row,
        ttft_s=reader.first_s - sent_s,
        tpot_s=(reader.last_s - reader.first_s) / (num_output - 1) if num_output > 1 else None,
        e2e_s=end_s - sent_s,
        num_prompt_tokens=reader.usage.prompt_tokens,
        num_cached_tokens=None if details is None else details.cached_tokens,
        num_cached_by_tier=None if reader.usage.kvist is None else reader.usage.kvist.cached_tokens,
        num_output_tokens=num_output,
        num_events=len(reader.gaps_s) + 1,
        route=None if report.route is None else report.route.reason,
        second_token_ms=None if report.handoff is None else report.handoff.second_token,
    )
    return RequestResult(row=whole, gaps_s=reader.gaps_s, token_ids=reader.token_ids)
