"""The stages of a request, and their measurement in an engine."""

from __future__ import annotations

import msgspec

RECEIVED = "received"  # first byte of the request → its body is read
TOKENISED = "tokenised"  # → decoded, rendered, tokenised and checked
QUEUED = "queued"  # waits for its turn, at the gateway or at a worker
GRAMMAR = "grammar"  # waits until the constraint of its answer is compiled
STORE = "store"  # waits for pages from the storage tier
PAGES = "pages"  # waits for pages: copied from the host tier, or computed by another request
PREFILL = "prefill"  # computes prompt tokens; one part for each chunk
HANDOFF = "handoff"  # pages travel from prefill to decode
DECODE = "decode"
PREEMPTED = "preempted"  # has lost its pages to another request, and waits for its turn
FAILOVER = "failover"  # its worker has failed: from the last token until another worker has the request
DETOKENISED = "detokenised"  # last token → bytes of the response
SENT = "sent"  # → the response is sent
OTHER = "other"  # explained by no stage: messages on their way, waits for the loops of the processes

STAGES = (
    *(RECEIVED, TOKENISED, QUEUED, GRAMMAR, STORE, PAGES, PREFILL, HANDOFF, DECODE),
    *(PREEMPTED, FAILOVER, DETOKENISED, SENT, OTHER),
)

MAX_PARTS = 64  # in one message, of one request
MAX_DETAIL_CHARS = 80


class StageTime(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A part of a request's time at one engine, in a message to the gateway. Parts are in order and without gaps."""

    stage: str  # of STAGES; a name that the gateway does not know counts as "other"
    duration_s: float
    detail: str = ""  # a text to be read


class StageClock:
    """Measures the stages of one request at one engine. Mutable; owned by the request. Times are the scheduler's."""

    __slots__ = ("_detail", "_parts", "_since_s", "_stage", "has_news")

    def __init__(self, now_s: float) -> None:
        self._stage, self._detail, self._since_s = QUEUED, "", now_s
        self._parts: list[StageTime] = []
        self.has_news = True  # something other than decoding has happened since the last `take`

    def enter(self, stage: str, now_s: float, detail: str = "") -> None:
        """Begin a stage, unless the request is in it; the one before ends."""
        if stage == self._stage and detail == self._detail:
            return
        self.end_part(now_s)
        self._stage, self._detail = stage, detail
        self.has_news = self.has_news or stage != DECODE

    def end_part(self, now_s: float, detail: str | None = None) -> None:
        """End a part of the present stage, which goes on. `detail`: of this part, in place of the stage's."""
        duration_s, self._since_s = now_s - self._since_s, now_s
        if duration_s > 0.0:
            self._add(StageTime(self._stage, duration_s, self._detail if detail is None else detail))

    def take(self, now_s: float, then: str = DECODE) -> tuple[StageTime, ...]:
        """Return all parts since the last call, for the message that brings a token. `then`: the stage from now on."""
        self.end_part(now_s)
        taken, self._parts = tuple(self._parts), []
        self._stage, self._detail, self.has_news = then, "", False
        return taken

    def _add(self, part: StageTime) -> None:
        if len(self._parts) < MAX_PARTS:
            self._parts.append(part)
            return
        last = self._parts[-1]  # a long prompt in small chunks, or many preemptions before one token
        stage = last.stage if last.stage == part.stage else OTHER
        self._parts[-1] = StageTime(stage, last.duration_s + part.duration_s, "several parts")
