"""Which stage of its time (flight/stages.py) a request is in, by its state. `Requests.move` notes the changes of state.

    COMPILING grammar   FETCHING store   WAITING queued   AWAITING_PAGES, LOADING pages   RUNNING prefill, then decode
    GRANTED, AWAITING_TRANSFER handoff   SUSPENDED, and WAITING after an admission: preempted

results.py ends a part of prefill with each chunk, and chunks.py sends the parts with the next token.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvist.flight.stages import DECODE, GRAMMAR, HANDOFF, PAGES, PREEMPTED, PREFILL, QUEUED, STORE, StageTime
from kvist.request import Mode
from kvist.scheduler.active import ActiveRequest, RequestState

_STAGES: Mapping[RequestState, tuple[str, str]] = {
    RequestState.COMPILING: (GRAMMAR, ""),
    RequestState.FETCHING: (STORE, ""),
    RequestState.AWAITING_PAGES: (PAGES, "another request computes or loads them"),
    RequestState.LOADING: (PAGES, "copied from the host tier"),
    RequestState.GRANTED: (HANDOFF, "pages are computed and written"),
    RequestState.AWAITING_TRANSFER: (HANDOFF, "decode has granted no pages yet"),
    RequestState.SUSPENDED: (PREEMPTED, ""),
}


def note_state(request: ActiveRequest, before: RequestState | None, now_s: float) -> None:
    """Begin the stage of the state that the request has entered. `before`: its state before; None on arrival."""
    to = request.state
    if to is RequestState.ENDED:
        return
    if to is RequestState.WAITING:
        lost_pages = before is RequestState.RUNNING or before is RequestState.SUSPENDED
        stage, detail = PREEMPTED if lost_pages else QUEUED, ""
    elif to is RequestState.RUNNING:
        stage, detail = DECODE if before is RequestState.GRANTED else PREFILL, ""
    else:
        stage, detail = _STAGES[to]
    request.stages.enter(stage, now_s, detail)


def note_no_pages(request: ActiveRequest, now_s: float) -> None:
    """Note that the head of the queue waits for pages."""
    if not request.was_admitted:
        request.stages.enter(PAGES, now_s, "no page is free")


def note_done(request: ActiveRequest, now_s: float) -> None:
    """Note that prefill has written all pages of a DECODE."""
    request.stages.enter(HANDOFF, now_s, "pages are verified")


def note_chunk(request: ActiveRequest, start: int, end: int, now_s: float) -> None:
    """Note that the tokens [start, end) are computed, if they are not tokens of a stream that goes on."""
    if request.stages.has_news:
        request.stages.end_part(now_s, f"tokens {start} to {end}")


def sent_stages(request: ActiveRequest, now_s: float) -> tuple[StageTime, ...]:
    """Return the parts for the message that brings a token, or the end."""
    if not request.stages.has_news:
        return ()
    return request.stages.take(now_s, HANDOFF if request.mode is Mode.PREFILL else DECODE)
