"""Turns a batch into columns of numbers, for the GPU's runner. Uses no GPU itself.

Nearly always a batch has the requests of the previous batch, in the same order, so the columns that do not change from
step to step are built once and carried over (`PersistentBatch`). Nearly always every item is one token; the loops here
are written for that case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from kvist.attention.backend import SpanColumns
from kvist.plan.batch import BatchItem
from kvist.request import RequestId, SamplingParams
from kvist.runner.sampler import hash_seeds, is_plain, key_words_at
from kvist.runner.staging import HostInputs

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistentBatch:
    """The requests of a batch, in order, and their columns that no step changes."""

    request_ids: list[RequestId]
    samplings: list[SamplingParams | None]
    numbers: Int64s  # 0, 1, ...: one per request
    ones: Int32s
    sampled: Int64s  # [R] the numbers of the requests that get a token
    slots: dict[RequestId, int]  # of each sampled request: the slot that will hold its token
    temperatures: npt.NDArray[np.float32]  # [R]
    hashed_seeds: npt.NDArray[np.uint64] | None  # [R]; None: all greedy
    is_plain: bool  # no sampling parameters but temperature and seed

    @classmethod
    def of(cls, request_ids: list[RequestId], samplings: list[SamplingParams | None]) -> PersistentBatch:
        params = [sampling for sampling in samplings if sampling is not None]
        sampled = [number for number, sampling in enumerate(samplings) if sampling is not None]
        temperatures = np.array([each.temperature for each in params], dtype=np.float32)
        return cls(
            request_ids=request_ids,
            samplings=samplings,
            numbers=np.arange(len(request_ids)),
            ones=np.ones(len(request_ids), dtype=np.int32),
            sampled=np.array(sampled, dtype=np.int64),
            slots={request_ids[number]: slot for slot, number in enumerate(sampled)},
            temperatures=temperatures,
            hashed_seeds=hash_seeds([each.seed for each in params]) if temperatures.any() else None,
            is_plain=all(map(is_plain, params)),
        )

    @property
    def all_sampled(self) -> bool:
        return len(self.sampled) == len(self.numbers)


EMPTY_BATCH = PersistentBatch.of([], [])


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchColumns:
    persistent: PersistentBatch
    inputs: HostInputs
    spans: SpanColumns
    is_plain: bool  # every token is chosen by temperature and noise alone
    only_decodes: bool  # every request computes one token and samples one


def read_batch(items: Sequence[BatchItem], previous: PersistentBatch) -> BatchColumns:
    """Build the columns of `items`. An item with `takes_sampled` reads its token from its slot of the `previous` batch;
    raises `KeyError` when that batch has no slot for the item's request."""
    request_ids = [item.request_id for item in items]
    samplings = [item.sampling for item in items]
    # fast: equal batches hold the same objects
    is_same = request_ids == previous.request_ids and samplings == previous.samplings
    persistent = previous if is_same else PersistentBatch.of(request_ids, samplings)
    starts = np.array([item.start for item in items], dtype=np.int32)
    page_ids = [item.page_ids for item in items]
    known_ids = [item.token_ids for item in items]
    num_known = list(map(len, known_ids))  # 0: `takes_sampled`
    if max(num_known) <= 1:
        spans = SpanColumns(starts, persistent.ones, page_ids)
        positions, last_rows = starts, persistent.numbers
    else:
        spans = SpanColumns(starts, np.array([count or 1 for count in num_known], dtype=np.int32), page_ids)
        positions, last_rows = spans.positions(), spans.counts.cumsum() - 1
    keys = None
    if persistent.hashed_seeds is not None:
        keys = key_words_at(persistent.hashed_seeds, spans.ends[persistent.sampled].astype(np.uint64))
    unknown, slots = _unknown(num_known, persistent, previous)
    inputs = HostInputs(
        token_ids=_flat(known_ids, len(unknown), len(positions)),
        unknown=last_rows[unknown],
        slots=slots,
        positions=positions,
        rows=last_rows[persistent.sampled],
        temperatures=persistent.temperatures,
        keys=keys,
    )
    return BatchColumns(
        persistent=persistent,
        inputs=inputs,
        spans=spans,
        is_plain=persistent.is_plain and not any([item.suppressed_token_ids for item in items]),  # noqa: C419  quicker
        only_decodes=spans.counts is persistent.ones and persistent.all_sampled,
    )


def _unknown(num_known: list[int], persistent: PersistentBatch, previous: PersistentBatch) -> tuple[Int64s, Int64s]:
    """Return the numbers of the items whose token is not known, and their slots in the previous batch."""
    if persistent is previous and persistent.all_sampled and not any(num_known):  # nearly always, with overlap
        return persistent.numbers, persistent.numbers
    unknown = [number for number, count in enumerate(num_known) if not count]
    slots = [previous.slots[persistent.request_ids[number]] for number in unknown]
    return np.array(unknown, dtype=np.int64), np.array(slots, dtype=np.int64)


def _flat(known_ids: list[Sequence[int]], num_unknown: int, num_tokens: int) -> Int32s:
    """Return the token ids in one array, [num_tokens]; 0 for an unknown token."""
    if num_unknown == len(known_ids):
        return np.zeros(num_tokens, dtype=np.int32)
    if num_unknown:
        known_ids = [token_ids or (0,) for token_ids in known_ids]
    return np.fromiter(chain.from_iterable(known_ids), dtype=np.int32, count=num_tokens)
