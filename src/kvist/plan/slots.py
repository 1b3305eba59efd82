"""The open request slots, derived from the batches alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvist.plan.batch import Batch
from kvist.request import RequestId, SlotId


class OpenSlots(Mapping[SlotId, RequestId]):
    """The slots that batches have started and not ended, with their requests. Mutable; `update` needs every batch, in
    order."""

    def __init__(self) -> None:
        self._request_ids: dict[SlotId, RequestId] = {}

    def update(self, batch: Batch) -> None:
        """End and start the slots of the batch."""
        request_ids = self._request_ids
        for slot in batch.ended:
            assert slot in request_ids, f"slot {slot} is ended, but it is not open"
            del request_ids[slot]
        for start in batch.started:
            holder = request_ids.get(start.slot)
            assert holder is None, f"{start.request_id} is started in slot {start.slot}, which {holder} holds"
            request_ids[start.slot] = start.request_id

    def running(self, batch: Batch) -> list[RequestId]:
        """Return the request of each item."""
        request_ids = self._request_ids
        return [request_ids[item.slot] for item in batch.items]

    def end_all(self) -> Batch:
        """Return a batch that ends all open slots, for a runner that continues with another scheduler."""
        batch = Batch(step_id=0, ended=tuple(self._request_ids), items=())
        self._request_ids.clear()
        return batch

    def __getitem__(self, slot: SlotId) -> RequestId:
        return self._request_ids[slot]

    def __iter__(self) -> Iterator[SlotId]:
        return iter(self._request_ids)

    def __len__(self) -> int:
        return len(self._request_ids)
