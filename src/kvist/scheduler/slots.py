"""Assigns a slot to every running request, and records which slots the next batch must end and start at the runner.

    take ──► started by the next batch ──► named by items ──► give_back ──► ended by the next batch

A slot is free for another request as soon as its request gives it back: one batch may end a slot and start it again. If
no batch has started the slot, the runner has not seen the request, and nothing is ended there.
"""

from __future__ import annotations

from kvist.plan.batch import StartRequest
from kvist.request import SlotId
from kvist.scheduler.active import ActiveRequest


class RequestSlots:
    """Mutable; its one owner is `Requests`."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._free = [SlotId(slot) for slot in reversed(range(num_slots))]  # the last one is taken next
        self._to_start: dict[SlotId, ActiveRequest] = {}
        self._to_end: list[SlotId] = []

    @property
    def num_taken(self) -> int:
        return self._num_slots - len(self._free)

    def take(self, request: ActiveRequest) -> None:
        """Assign a slot to a request that begins to run. At most `num_slots` requests run at once."""
        request.slot = slot = self._free.pop()
        self._to_start[slot] = request

    def give_back(self, request: ActiveRequest) -> None:
        """Free the slot of a request that no longer runs."""
        slot = request.slot
        del request.slot  # unset, so that no item can name the slot any more
        self._free.append(slot)
        if self._to_start.pop(slot, None) is None:
            self._to_end.append(slot)

    def drain(self) -> tuple[tuple[SlotId, ...], tuple[StartRequest, ...]]:
        """Return the slots to end and the requests to start in the batch that is being planned."""
        if not self._to_start and not self._to_end:
            return (), ()
        ended, started = tuple(self._to_end), tuple(_start(*each) for each in self._to_start.items())
        self._to_end.clear()
        self._to_start.clear()
        return ended, started


def _start(slot: SlotId, request: ActiveRequest) -> StartRequest:
    suppresses = len(request.token_ids) < request.suppress_until
    return StartRequest(
        slot=slot,
        request_id=request.request_id,
        sampling=request.sampling,
        token_ids=request.token_ids,
        num_prompt_tokens=request.num_prompt,
        suppressed_token_ids=request.suppressed_ids if suppresses else (),
        suppress_until=request.suppress_until if suppresses else 0,
    )
