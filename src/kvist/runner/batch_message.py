"""A batch as rank 0 sends it to the other ranks, without the parts that they know already.

A request that starts is sent with its tokens so far only if sampling needs them (`SamplingParams.needs_history`); else
its tokens are sent in the items alone. Most items continue an item of an earlier step, with one more token and perhaps
one more page. Both ends keep the page list of every open slot, so a message contains only the new pages. 256 decodes
take about 1.5 kB.

Page lists keep their identity at the receiver: a list that was sent before grows, and a list that was replaced becomes
a new list (attention/page_tables.py relies on this).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.request import SlotId

_NOT_SCORED: tuple[int | None, Sequence[int]] = (None, ())


class BatchMessage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Lists from `slots` to `samples` have one entry per item, in order."""

    step_id: int
    ended: Sequence[SlotId]
    started: Sequence[StartRequest]
    slots: list[SlotId]
    starts: list[int]
    token_ids: list[Sequence[int]]  # empty: the token that was sampled last in the slot
    samples: list[bool]
    pages: list[tuple[SlotId, int, Sequence[int]]]  # slot, num_pages already sent, the pages after those; 0: a new list
    scored: list[tuple[int, int, Sequence[int]]]  # item index, `score_from`, the scored tokens


@dataclass(slots=True)
class _SentPages:
    """The page list of a slot at the other ranks. Owned by `BatchEncoder`."""

    page_ids: Sequence[int]
    num_pages: int = 0


class BatchEncoder:
    """Rank 0's side. Every message must reach every rank, in order."""

    def __init__(self) -> None:
        self._sent: dict[SlotId, _SentPages] = {}  # of open slots
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, batch: Batch) -> bytes:
        sent = self._sent
        for slot in batch.ended:
            sent.pop(slot, None)  # a slot that never had an item has no pages
        pages: list[tuple[SlotId, int, Sequence[int]]] = []
        items = batch.items
        for item in items:  # nearly always there is nothing to add
            known = sent.get(item.slot)
            if known is None:
                sent[item.slot] = known = _SentPages(item.page_ids)
            elif known.page_ids is not item.page_ids:
                known.page_ids, known.num_pages = item.page_ids, 0
            if len(item.page_ids) != known.num_pages:
                pages.append((item.slot, known.num_pages, item.page_ids[known.num_pages :]))
                known.num_pages = len(item.page_ids)
        message = BatchMessage(
            batch.step_id,
            batch.ended,
            [_to_send(start) for start in batch.started],
            [item.slot for item in items],
            [item.start for item in items],
            [item.token_ids for item in items],
            [item.samples for item in items],
            pages,
            [
                (i, item.score_from, item.scored_token_ids)
                for i, item in enumerate(items)
                if item.score_from is not None
            ],
        )
        return self._encoder.encode(message)


def _to_send(start: StartRequest) -> StartRequest:
    return start if start.sampling.needs_history else msgspec.structs.replace(start, token_ids=())


class BatchDecoder:
    """The side of the other ranks."""

    def __init__(self) -> None:
        self._page_ids: dict[SlotId, list[int]] = {}  # of open slots
        self._decoder = msgspec.msgpack.Decoder(BatchMessage)

    def decode(self, payload: bytes) -> Batch:
        message = self._decoder.decode(payload)
        known = self._page_ids
        for slot in message.ended:
            known.pop(slot, None)
        for slot, num_known, page_ids in message.pages:
            if num_known == 0:
                known[slot] = list(page_ids)
            else:
                assert num_known == len(known[slot]), "messages arrive complete and in order"
                known[slot] += page_ids
        scored = {index: (score_from, token_ids) for index, score_from, token_ids in message.scored}
        each = zip(message.slots, message.starts, message.token_ids, message.samples, strict=True)
        items = [
            BatchItem(
                slot=slot,
                token_ids=token_ids,
                start=start,
                page_ids=known[slot],
                samples=samples,
                score_from=scored.get(index, _NOT_SCORED)[0],
                scored_token_ids=scored.get(index, _NOT_SCORED)[1],
            )
            for index, (slot, start, token_ids, samples) in enumerate(each)
        ]
        return Batch(
            step_id=message.step_id, ended=tuple(message.ended), started=tuple(message.started), items=tuple(items)
        )
