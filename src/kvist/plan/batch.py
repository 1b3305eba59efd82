"""One step of the runner: a batch of rows, each a request's share of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvist.request import RequestId, SamplingParams


class BatchItem(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request's share of a step: compute K/V for positions [start, end).

    A struct, not a dataclass: a step makes hundreds of them, and a struct costs a tenth of a dataclass.
    """

    request_id: RequestId
    token_ids: Sequence[int]  # the tokens at [start, end); empty: see `takes_sampled`
    start: int  # K/V of [0, start) is in the pages, at the latest when the pending batch is finished
    page_ids: Sequence[int]  # pages of positions [0, end), perhaps more
    sampling: SamplingParams | None = None  # None: sample no token (the chunk does not end the sequence)
    suppressed_token_ids: tuple[int, ...] = ()  # not sampled for this token (min_tokens)

    @property
    def takes_sampled(self) -> bool:
        """Whether the item's one token is still being sampled, by the pending batch."""
        return not self.token_ids

    @property
    def end(self) -> int:
        """Position of the next token; also the counter of its sampling noise."""
        return self.start + self.num_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    step_id: int
    items: tuple[BatchItem, ...]  # decodes (one token each) first, then prefill chunks

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)
