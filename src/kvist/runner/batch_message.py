"""A batch as rank 0 sends it to the other ranks: the differences from the previous batch.

Most items of a step continue an item of the previous step: one more token, perhaps one more page. Therefore a message
refers to the previous message (`previous`), and carries whole page lists and sampling parameters only where a request
is new. Both ends remember one batch and no more; a request that skips a batch is sent again in full. 256 decodes take
about 1.5 kB.

Page lists keep their identity at the receiver, too: a list that was sent before grows, a replaced list becomes a new
list (attention/page_tables.py relies on it). The receiver makes up its own request ids: it never needs the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvist.plan.batch import Batch, BatchItem
from kvist.request import RequestId, SamplingParams


class BatchMessage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Lists up to `wants_token` have one entry per item, in order; entries of the others name their item by index."""

    step_id: int
    previous: list[int | None]  # the item's index in the previous batch; None: not in that batch
    starts: list[int]
    token_ids: list[Sequence[int]]  # empty: the token that the previous batch samples
    wants_token: list[bool]
    pages: list[tuple[int, int, Sequence[int]]]  # index, num_pages already sent, the pages after those; 0: a new list
    sampling: list[tuple[int, SamplingParams]]
    suppressed: list[tuple[int, tuple[int, ...]]]


@dataclass(slots=True)
class _KnownRequest:
    """The state of a request at the other ranks. Owned by `BatchEncoder`."""

    index: int
    page_ids: Sequence[int]
    num_pages: int = 0
    sampling: SamplingParams | None = None


class BatchEncoder:
    """Rank 0's side. Every message must reach every rank, in order."""

    def __init__(self) -> None:
        self._known: dict[RequestId, _KnownRequest] = {}  # of the previous batch
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, batch: Batch) -> bytes:
        before, current = self._known, {}
        previous: list[int | None] = []
        pages: list[tuple[int, int, Sequence[int]]] = []
        sampling: list[tuple[int, SamplingParams]] = []
        suppressed: list[tuple[int, tuple[int, ...]]] = []
        items = batch.items
        for index, item in enumerate(items):  # nearly always: nothing to add
            known = before.get(item.request_id)
            if known is None:
                previous.append(None)
                known = _KnownRequest(index, item.page_ids)
            else:
                previous.append(known.index)
                known.index = index
                if known.page_ids is not item.page_ids:
                    known.page_ids, known.num_pages = item.page_ids, 0
            if len(item.page_ids) != known.num_pages:
                pages.append((index, known.num_pages, item.page_ids[known.num_pages :]))
                known.num_pages = len(item.page_ids)
            if item.sampling is not known.sampling and item.sampling is not None:
                sampling.append((index, item.sampling))
                known.sampling = item.sampling
            if item.suppressed_token_ids:
                suppressed.append((index, item.suppressed_token_ids))
            current[item.request_id] = known
        self._known = current
        message = BatchMessage(
            batch.step_id,
            previous,
            [item.start for item in items],
            [item.token_ids for item in items],
            [item.sampling is not None for item in items],
            pages,
            sampling,
            suppressed,
        )
        return self._encoder.encode(message)


@dataclass(slots=True)
class _Request:
    """Owned by `BatchDecoder`."""

    name: RequestId
    page_ids: list[int]
    sampling: SamplingParams | None = None


class BatchDecoder:
    """The side of the other ranks."""

    def __init__(self) -> None:
        self._requests: list[_Request] = []  # of the previous batch
        self._num_named = 0
        self._decoder = msgspec.msgpack.Decoder(BatchMessage)

    def decode(self, payload: bytes) -> Batch:
        message = self._decoder.decode(payload)
        before = self._requests
        requests = [self._new() if index is None else before[index] for index in message.previous]
        for index, num_known, page_ids in message.pages:
            request = requests[index]
            if num_known == 0:
                request.page_ids = list(page_ids)
            else:
                assert num_known == len(request.page_ids), "messages arrive complete and in order"
                request.page_ids += page_ids
        for index, params in message.sampling:
            requests[index].sampling = params
        suppressed = dict(message.suppressed)
        self._requests = requests
        each = zip(requests, message.starts, message.token_ids, message.wants_token, strict=True)
        items = [
            BatchItem(
                request_id=request.name,
                token_ids=token_ids,
                start=start,
                page_ids=request.page_ids,
                sampling=request.sampling if wants_token else None,
                suppressed_token_ids=suppressed.get(index, ()),
            )
            for index, (request, start, token_ids, wants_token) in enumerate(each)
        ]
        return Batch(step_id=message.step_id, items=tuple(items))

    def _new(self) -> _Request:
        self._num_named += 1
        return _Request(RequestId(str(self._num_named)), [])
