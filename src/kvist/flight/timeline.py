"""The stages of one answer, as the gateway puts them together: its own, and those that engines have measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvist.flight.records import Stage
from kvist.flight.stages import (
    DECODE,
    FAILOVER,
    HANDOFF,
    MAX_DETAIL_CHARS,
    MAX_PARTS,
    OTHER,
    PREFILL,
    QUEUED,
    SENT,
    STAGES,
    StageTime,
)

GATEWAY = "gateway"
MAX_STAGES = 128  # of one answer; what comes after them is one stage

_KNOWN = frozenset(STAGES)
_LATE_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class SentTo:
    """The workers that have the request."""

    prefill: str
    decode: str  # that generates the answer; the same as `prefill` if one worker does both
    is_queued: Callable[[], bool] = lambda: False  # whether the request waits for its turn at `prefill`, by its reports


class Timeline:
    """Stages from `start_s` to `end_s` in order, without gaps: each call moves the end. Mutable; one owner at a time,
    the task of the request or the dispatcher. Times are of one monotonic clock."""

    __slots__ = ("_has_failed", "_sent_s", "_sent_to", "_stages", "_worker", "end_s", "start_s", "token_s")

    def __init__(self, start_s: float) -> None:
        self.start_s = self.end_s = start_s
        self._stages: list[tuple[str, str, float, str]] = []  # name, where, end, detail
        self.token_s: float | None = None  # when the newest token arrived; set by the dispatcher, for every chunk
        self._worker = GATEWAY  # that sends the tokens
        self._sent_to: SentTo | None = None  # None before the first `on_submit`
        self._sent_s = start_s
        self._has_failed = False  # since the last `on_submit`

    def fork(self) -> Timeline:
        """Return a timeline that goes on from here by itself."""
        other = Timeline(self.start_s)
        other.end_s, other._stages = self.end_s, self._stages.copy()
        other.token_s, other._worker = self.token_s, self._worker
        other._sent_to, other._sent_s, other._has_failed = self._sent_to, self._sent_s, self._has_failed
        return other

    def advance(self, stage: str, until_s: float, where: str = GATEWAY, detail: str = "") -> None:
        """Count the time since the last stage's end to this stage. A time before that end changes nothing."""
        if not until_s > self.end_s:
            return
        stages, self.end_s = self._stages, until_s
        if stages and stages[-1][0] == stage and stages[-1][1] == where and stages[-1][3] == detail:
            stages.pop()
        elif len(stages) == MAX_STAGES:
            stages.pop()
            stage, where, detail = OTHER, GATEWAY, "further stages"
        stages.append((stage, where, until_s, detail))

    # ---------------------------------------------------------------- events of the dispatcher

    def on_submit(self, now_s: float, sent_to: SentTo, problem: str | None = None) -> None:
        """Note that the request has been sent to a worker, or to a pair. `problem`: the failure before, if the request
        goes on elsewhere."""
        self.on_last_token()
        self.advance(QUEUED if problem is None else FAILOVER, now_s, detail=(problem or "")[:MAX_DETAIL_CHARS])
        self._worker, self._sent_to, self._sent_s, self._has_failed = sent_to.decode, sent_to, now_s, False

    def on_failure(self) -> None:
        """Note that a worker has failed, and that the request waits for another one."""
        self._has_failed = True

    def on_stored(self, now_s: float, where: str) -> None:
        """Note that prefill has stored the pages of the prompt, after its token, and that decode gets the request."""
        self.on_last_token()
        self.advance(HANDOFF, now_s, where, "pages are stored")

    @property
    def latest_s(self) -> float:
        """The end, or the newest token after it."""
        return self.end_s if self.token_s is None else max(self.end_s, self.token_s)

    def on_last_token(self) -> None:
        """Count the time up to the newest token as decoding."""
        if self.token_s is not None:
            self.advance(DECODE, self.token_s, self._worker)

    def lay(self, parts: Sequence[StageTime], until_s: float, where: str) -> None:
        """Place the parts that a worker has measured so that they end at `until_s`. The part of them before the last
        stage's end is left out, since the answer had another worker then."""
        parts, self._worker = parts[:MAX_PARTS], where
        goes_on = self.token_s is not None and bool(parts) and parts[0].stage == DECODE
        durations_s = [part.duration_s if 0.0 < part.duration_s < float("inf") else 0.0 for part in parts]
        end_s = until_s - sum(durations_s)
        self.advance(DECODE if goes_on else OTHER, min(end_s, until_s), where)  # messages on their way
        for part, duration_s in zip(parts, durations_s, strict=True):
            end_s += duration_s
            stage = part.stage if part.stage in _KNOWN else OTHER
            self.advance(stage, min(end_s, until_s), where, part.detail[:MAX_DETAIL_CHARS])

    def ends_early(self, now_s: float) -> None:
        """Note that the answer ends before its last token: count the time since the last one to the present stage."""
        self.on_last_token()
        stage, where = self._present()
        self.advance(stage, now_s, where)

    # ---------------------------------------------------------------- events of the reader

    def on_taken(self, now_s: float) -> None:
        """Note that the reader has taken the last tokens. A reader that takes them late was still sending the tokens
        before, or waited for the loop of the gateway."""
        self.on_last_token()
        if self.token_s is not None and now_s - self.end_s > _LATE_S:
            self.advance(SENT, now_s, detail="tokens before the last ones")

    # ---------------------------------------------------------------- reading

    def so_far(self, now_s: float, *, has_all_tokens: bool = False) -> Timeline:
        """Return a copy that ends now. The time since the last token or stage belongs to the stage in which the
        gateway believes the request to be: engines report the stages before a token with that token."""
        copy = self.fork()
        copy.on_last_token()
        stage, where = (SENT, GATEWAY) if has_all_tokens else self._present()
        copy.advance(stage, now_s, where, "" if stage == DECODE else "under way")
        return copy

    def _present(self) -> tuple[str, str]:
        """Return the stage in which the request is, and where."""
        sent_to = self._sent_to
        if sent_to is None:
            return OTHER, GATEWAY
        if self._has_failed:
            return FAILOVER, GATEWAY
        if self.token_s is None or self.token_s < self._sent_s:
            return QUEUED if sent_to.is_queued() else PREFILL, sent_to.prefill
        return HANDOFF if self._worker != sent_to.decode else DECODE, sent_to.decode

    def stages(self) -> tuple[Stage, ...]:
        found, before_s = [], self.start_s
        for name, where, end_s, detail in self._stages:
            start_s, duration_s = round(before_s - self.start_s, 6), round(end_s - before_s, 6)
            found.append(Stage(name, where, start_s, duration_s, detail or None))
            before_s = end_s
        return tuple(found)
