"""The record of a request, as GET /requests shows it. No part of a prompt or an answer is in it."""

from __future__ import annotations

import enum

import msgspec


class Status(enum.Enum):
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"  # the client has left, or has cancelled the request


class Stage(msgspec.Struct, frozen=True, gc=False):
    name: str  # of stages.STAGES
    where: str  # the id of a worker, or "gateway"
    start_s: float  # since the request was received
    duration_s: float
    detail: str | None = None


class CachedTokens(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Tokens of the prompt that were cached, by the tier that had them."""

    device: int = 0
    host: int = 0
    storage: int = 0


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """With several answers, times and stages are of the answer that ended last, and counts are of all."""

    id: str  # the response's `x-request-id`
    response_id: str  # `id` in the body of the response, unless the request has set another
    trace_id: str | None  # of W3C trace context
    endpoint: str
    model: str
    received_unix_s: float
    duration_s: float  # so far, while it runs
    ttft_s: float | None
    status: Status
    error: str | None = None  # code of the error, if it failed
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: CachedTokens
    completion_tokens: int
    answers: int
    workers: tuple[str, ...]
    stages: tuple[Stage, ...]
