"""The calls of a store that are under way, and the host slots that they hold.

A call that takes longer than the deadline hangs. Its slots are in quarantine until the call returns, because it may
still read or write them: a late write therefore cannot damage another page. The call also keeps its thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvist.plan.tiers import FetchPages, FindPages, StorePages

Job = FindPages | FetchPages | StorePages


@dataclass(frozen=True, slots=True)
class Probe:
    """A call that finds out whether the store answers. No request waits for it."""


@dataclass(slots=True, eq=False)
class StoreCall:
    """A job that a thread is running. Mutable; owned by the thread, except `hangs`, which the engine loop sets."""

    job: Job | Probe
    started_s: float  # when the current call of the store began: a long job makes several calls
    hangs: bool = False  # the call took longer than the deadline
    answered: bool = False  # the store has answered for every page of the job

    @property
    def slots(self) -> tuple[int, ...]:
        return () if isinstance(self.job, FindPages | Probe) else self.job.host_slots


class CallsUnderWay:
    """Mutable; guarded by the lock of its store's threads."""

    def __init__(self) -> None:
        self._calls: dict[StoreCall, None] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[StoreCall]:
        return iter(self._calls)

    def begin(self, job: Job | Probe, now_s: float) -> StoreCall:
        call = StoreCall(job, now_s)
        self._calls[call] = None
        return call

    def end(self, call: StoreCall) -> None:
        del self._calls[call]

    @property
    def some_in_time(self) -> bool:
        return any(not call.hangs for call in self._calls)

    def quarantine(self, now_s: float, deadline_s: float) -> list[StoreCall]:
        """Mark the calls that have passed their deadline; return the newly marked calls."""
        late = [call for call in self._calls if not call.hangs and now_s - call.started_s > deadline_s]
        for call in late:
            call.hangs = True
        return late

    @property
    def num_quarantined_pages(self) -> int:
        return sum(len(call.slots) for call in self._calls if call.hangs)
