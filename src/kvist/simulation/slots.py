"""Checks the life of request slots in the batches of one scheduler, as every rank of a runner will see them."""

from __future__ import annotations

from kvist.plan.batch import Batch
from kvist.plan.slots import OpenSlots
from kvist.request import RequestId, SlotId


class SlotCheck:
    """Mutable; reads every planned batch, in order."""

    def __init__(self, num_slots: int) -> None:
        self.open = OpenSlots()
        self.running: list[RequestId] = []  # the requests of the newest batch
        self._num_slots = num_slots
        self._next_start: dict[SlotId, int] = {}  # position after the slot's newest row
        self._known: dict[SlotId, int] = {}  # tokens that the request had when its slot was started
        self._sampling: set[SlotId] = set()  # slots for which the newest batch samples

    def read(self, batch: Batch) -> None:
        self.open.update(batch)  # no slot is ended twice, none is started while it is open
        for slot in batch.ended:
            self._next_start.pop(slot, None)
            self._sampling.discard(slot)
        for start in batch.started:
            assert 0 <= start.slot < self._num_slots
            assert 0 <= start.num_prompt_tokens <= len(start.token_ids)
            assert (start.suppress_until > len(start.token_ids)) == bool(start.suppress_until)
            self._known[start.slot] = len(start.token_ids)
        assert len(set(self.open.values())) == len(self.open), "a request has two slots"
        slots = [item.slot for item in batch.items]
        assert len(set(slots)) == len(slots), "two rows have one slot"
        for item in batch.items:
            assert item.slot in self.open, f"slot {item.slot} is used after its end"
            assert item.start == self._next_start.get(item.slot, item.start), "a row does not continue its request"
            assert item.start < self._known[item.slot] or item.slot in self._next_start
            if item.takes_sampled:
                assert item.slot in self._sampling, "the batch before samples no token for this row"
            self._next_start[item.slot] = item.end
        self._sampling = {item.slot for item in batch.items if item.samples}
        self.running = self.open.running(batch)
