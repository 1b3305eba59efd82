"""Turns a batch into columns of numbers, for the runner on GPUs. Does not use a GPU itself.

A batch nearly always has the slots of the previous batch, in the same order. The columns that no step changes are
therefore gathered from the slot table once and reused (`PersistentBatch`). An item is nearly always one token; the
loops here are fastest in that case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from kvist.attention.backend import SpanColumns
from kvist.plan.batch import Batch
from kvist.request import SlotId
from kvist.runner.sampler import key_words_at
from kvist.runner.shaping import table_sizes
from kvist.runner.slots import SlotTable
from kvist.runner.staging import PARAMETERS, HostInputs

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistentBatch:
    """The slots of a batch, in order, and their columns that no step changes."""

    slots: list[SlotId]
    samples: list[bool]
    slot_column: Int64s  # `slots` as an array
    numbers: Int64s  # 0, 1, ...: one per item
    ones: Int32s
    sampled: Int64s  # [R] the numbers of the items that get a token
    sampled_slots: Int64s  # [R]
    parameters: Int32s  # [len(PARAMETERS), R]: the bits of each parameter
    hashed_seeds: npt.NDArray[np.uint64] | None  # [R]; None: all greedy
    wants_logprobs: bool

    @classmethod
    def of(cls, slots: list[SlotId], samples: list[bool], table: SlotTable) -> PersistentBatch:
        """Gather the columns from `table`, in which the slots must be open."""
        assert all(slot in table.open_slots for slot in slots), "an item's slot is not open"
        slot_column = np.array(slots, dtype=np.int64)
        sampled = np.flatnonzero(np.array(samples, dtype=np.bool_))
        sampled_slots = slot_column[sampled]
        params = table.sampling
        by_name = {
            "temperatures": params.temperatures.view(np.int32),
            "top_k": params.top_k,
            "top_p": params.top_p.view(np.int32),
            "reach": params.reach.view(np.int32),
            "flags": table.shaping.flags,
        }
        return cls(
            slots=slots,
            samples=samples,
            slot_column=slot_column,
            numbers=np.arange(len(slots)),
            ones=np.ones(len(slots), dtype=np.int32),
            sampled=sampled,
            sampled_slots=sampled_slots,
            parameters=np.stack([by_name[name][sampled_slots] for name in PARAMETERS]),
            hashed_seeds=params.hashed_seeds[sampled_slots] if params.temperatures[sampled_slots].any() else None,
            wants_logprobs=bool(params.wants_logprobs[sampled_slots].any()),
        )

    @property
    def all_sampled(self) -> bool:
        return len(self.sampled) == len(self.numbers)


_NO_SLOTS = SlotTable(table_sizes(0, vocab_size=0, context_len=0), torch.device("cpu"))
EMPTY_BATCH = PersistentBatch.of([], [], _NO_SLOTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchColumns:
    persistent: PersistentBatch
    inputs: HostInputs
    spans: SpanColumns
    only_decodes: bool  # every item computes one token and samples one


def read_batch(batch: Batch, previous: PersistentBatch, table: SlotTable) -> BatchColumns:
    """Build the columns of a batch with items. `previous`: of the previous batch. `table` has the slots that the batch
    starts. An item with `takes_sampled` reads the last token of its slot."""
    items = batch.items
    slots = [item.slot for item in items]
    samples = [item.samples for item in items]
    is_same = not (batch.started or batch.ended) and slots == previous.slots and samples == previous.samples
    persistent = previous if is_same else PersistentBatch.of(slots, samples, table)
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
    ends = spans.ends[persistent.sampled]  # of the items that get a token: the position of that token
    keys = None
    if persistent.hashed_seeds is not None:
        keys = key_words_at(persistent.hashed_seeds, ends.astype(np.uint64))
    # nearly always, with overlap, no token is known
    unknown = np.flatnonzero(np.array(num_known) == 0) if any(num_known) else persistent.numbers
    inputs = HostInputs(
        token_ids=_flat(known_ids, len(unknown), len(positions)),
        unknown=last_rows[unknown],
        unknown_slots=persistent.slot_column[unknown],
        positions=positions,
        rows=last_rows[persistent.sampled],
        slots=persistent.sampled_slots,
        parameters=persistent.parameters,
        keys=keys,
    )
    return BatchColumns(
        persistent=persistent,
        inputs=inputs,
        spans=spans,
        only_decodes=spans.counts is persistent.ones and persistent.all_sampled,
    )


def _flat(known_ids: list[Sequence[int]], num_unknown: int, num_tokens: int) -> Int32s:
    """Return the token ids in one array, [num_tokens]; 0 for an unknown token."""
    if num_unknown == len(known_ids):
        return np.zeros(num_tokens, dtype=np.int32)
    if num_unknown:
        known_ids = [token_ids or (0,) for token_ids in known_ids]
    return np.fromiter(chain.from_iterable(known_ids), dtype=np.int32, count=num_tokens)
