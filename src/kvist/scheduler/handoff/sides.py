"""All handoffs of one engine: each call goes to the side that the request's mode decides.

A request of mode FULL has no handoff, or loads its pages from the store. All parts outside this folder end a request
by `Handoffs.end`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from kvist.plan.events import Event
from kvist.plan.transfers import PeerDied
from kvist.request import EpochId, Mode, Outcome
from kvist.scheduler.active import ActiveRequest, DecodeRequest, PrefillRequest, StoringRequest
from kvist.scheduler.handoff.side import SideParts
from kvist.scheduler.handoff.source import SourceSide
from kvist.scheduler.handoff.stored import StoredHandoffs
from kvist.scheduler.handoff.target import TargetSide
from kvist.scheduler.timers import TimerKind
from kvist.wire import Submit


class Handoffs:
    def __init__(self, source: SourceSide, target: TargetSide, stored: StoredHandoffs, parts: SideParts) -> None:
        self.source = source
        self.target = target
        self.stored = stored
        self._endings = parts.endings
        self._context = parts.context

    def handlers(self) -> Mapping[type[Event], Callable[[Any], None]]:
        """Return the handler of each event of a handoff."""
        return {**self.source.handlers(), **self.target.handlers(), PeerDied: self._on_peer_died}

    def timer_handlers(self) -> Mapping[TimerKind, Callable[[str], None]]:
        return {**self.source.timer_handlers(), **self.target.timer_handlers(), **self.stored.timer_handlers()}

    @property
    def num_open(self) -> int:
        return self.source.num_open + self.target.num_open

    @property
    def watched_epochs(self) -> frozenset[EpochId]:
        """The epochs whose death the loop must report."""
        return self.source.watched_epochs | self.target.watched_epochs

    def on_arrived(self, request: ActiveRequest) -> None:
        """Open the handoff of an accepted request; may end the request."""
        if isinstance(request, PrefillRequest):
            self.source.on_arrived(request)
        elif isinstance(request, DecodeRequest):
            self.target.on_arrived(request)

    def on_refused(self, event: Submit, code: str, message: str) -> None:
        """Close the handoff of a refused PREFILL. A refused DECODE has granted no pages: its prefill ends by the grant
        timeout or by the gateway's Abort."""
        if event.mode is Mode.PREFILL and event.handoff_id is not None:
            self.source.on_refused(event.handoff_id, code, message)

    def on_allocated(self, request: ActiveRequest) -> None:
        """Continue the handoff: the lease of the request now covers all its tokens."""
        if isinstance(request, PrefillRequest):
            self.source.on_computed(request)  # write the cached pages
        elif isinstance(request, DecodeRequest) and not request.granted:
            self.target.grant_pages(request)
        elif request.from_store:
            self.stored.on_loaded(request)

    def on_computed(self, request: PrefillRequest) -> None:
        """Write the pages that have become full; more K/V of the request, perhaps all, is computed."""
        self.source.on_computed(request)

    def on_second_token(self, request: ActiveRequest, planned_s: float) -> None:
        """Complete the report with the times since the pages were there. `planned_s`: when the step was planned."""
        context, report = self._context, request.handoff_report
        assert report is not None
        admission_s, first_step_s = max(0.0, planned_s - request.taken_over_s), context.now_s - planned_s
        request.handoff_report = msgspec.structs.replace(report, admission_s=admission_s, first_step_s=first_step_s)
        context.count("handoff_admission_seconds", admission_s)
        context.count("handoff_first_step_seconds", first_step_s)

    def end(self, request: ActiveRequest, outcome: Outcome, code: str | None = None, message: str = "") -> None:
        """End the request, and stop its handoff."""
        self._endings.end(request, outcome, code, message)
        if isinstance(request, StoringRequest):
            self.stored.on_ended(request)
        elif isinstance(request, PrefillRequest):
            self.source.on_ended(request, outcome, message or outcome.value)
        elif isinstance(request, DecodeRequest):
            self.target.on_ended(request, outcome, message or outcome.value)

    def _on_peer_died(self, event: PeerDied) -> None:
        self.source.on_peer_died(event)
        self.target.on_peer_died(event)
