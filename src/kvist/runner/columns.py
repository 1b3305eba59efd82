"""A batch as columns of numbers, for the GPU's runner. Knows no GPU.

Nearly always a batch has the requests of the batch before, in the same order, so what stays the same for a request from
step to step is made once and carried over (`Roster`). And nearly always every item is one token; the loops here are
those of that case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from kvist.attention.backend import SpanColumns
from kvist.request import RequestId, SamplingParams
from kvist.runner.sampler import hash_seeds, is_plain, key_words_at
from kvist.runner.staging import HostWords
from kvist.scheduler.plan import BatchItem

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """The requests of a batch, in order, and what no step changes for them."""

    request_ids: list[RequestId]
    samplings: list[SamplingParams | None]
    numbers: Int64s  # 0, 1, ... one for each
    ones: Int32s
    sampled: Int64s  # the numbers of those that get a token
    slots: dict[RequestId, int]  # of those: where the token will be
    temperatures: npt.NDArray[np.float32]  # of those
    hashed_seeds: npt.NDArray[np.uint64] | None  # of those; None: all greedy
    is_plain: bool  # no parameters but temperature and seed

    @classmethod
    def of(cls, request_ids: list[RequestId], samplings: list[SamplingParams | None]) -> Roster:
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


NOBODY = Roster.of([], [])


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchColumns:
    roster: Roster
    words: HostWords
    spans: SpanColumns
    is_plain: bool  # temperature and noise are all there is to every choice
    only_decodes: bool  # every request computes one token and gets another


def read_batch(items: Sequence[BatchItem], former: Roster) -> BatchColumns:
    """`former`: of the batch before, whose slots have the tokens that `takes_sampled` means. Raises `KeyError` when it
    has none for such an item."""
    request_ids = [item.request_id for item in items]
    samplings = [item.sampling for item in items]
    is_same = request_ids == former.request_ids and samplings == former.samplings  # quick: they are the same objects
    roster = former if is_same else Roster.of(request_ids, samplings)
    starts = np.array([item.start for item in items], dtype=np.int32)
    page_ids = [item.page_ids for item in items]
    known_ids = [item.token_ids for item in items]
    num_known = list(map(len, known_ids))  # 0: `takes_sampled`
    if max(num_known) <= 1:
        spans = SpanColumns(starts, roster.ones, page_ids)
        positions, last_rows = starts, roster.numbers
    else:
        spans = SpanColumns(starts, np.array([count or 1 for count in num_known], dtype=np.int32), page_ids)
        positions, last_rows = spans.positions(), spans.counts.cumsum() - 1
    keys = None
    if roster.hashed_seeds is not None:
        keys = key_words_at(roster.hashed_seeds, spans.ends[roster.sampled].astype(np.uint64))
    unknown, slots = _unknown(num_known, roster, former)
    words = HostWords(
        token_ids=_flat(known_ids, len(unknown), len(positions)),
        unknown=last_rows[unknown],
        slots=slots,
        positions=positions,
        rows=last_rows[roster.sampled],
        temperatures=roster.temperatures,
        keys=keys,
    )
    return BatchColumns(
        roster=roster,
        words=words,
        spans=spans,
        is_plain=roster.is_plain and not any([item.suppressed_token_ids for item in items]),  # noqa: C419  quicker
        only_decodes=spans.counts is roster.ones and roster.all_sampled,
    )


def _unknown(num_known: list[int], roster: Roster, former: Roster) -> tuple[Int64s, Int64s]:
    """The numbers of items whose token is not known, and its slots in the batch before."""
    if roster is former and roster.all_sampled and not any(num_known):  # nearly always, with overlap
        return roster.numbers, roster.numbers
    unknown = [number for number, count in enumerate(num_known) if not count]
    slots = [former.slots[roster.request_ids[number]] for number in unknown]
    return np.array(unknown, dtype=np.int64), np.array(slots, dtype=np.int64)


def _flat(known_ids: list[Sequence[int]], num_unknown: int, num_tokens: int) -> Int32s:
    """[num_tokens]; 0 for an unknown one."""
    if num_unknown == len(known_ids):
        return np.zeros(num_tokens, dtype=np.int32)
    if num_unknown:
        known_ids = [token_ids or (0,) for token_ids in known_ids]
    return np.fromiter(chain.from_iterable(known_ids), dtype=np.int32, count=num_tokens)
