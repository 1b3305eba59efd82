"""One step of the runner: the requests that it ends and starts, and an item for each request that it computes.

Every rank of the runner keeps a table of request slots. `StartRequest` opens a slot. Besides its pages, a request's
next tokens depend only on its slot: on its sampling parameters and the tokens so far. The items of a batch name their
slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvist.request import RequestId, SamplingParams, SlotId


class StartRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Opens a slot. A request that was preempted is started again, with all its tokens so far."""

    slot: SlotId
    request_id: RequestId
    sampling: SamplingParams
    token_ids: Sequence[int]  # prompt and output so far; the scheduler's own list, which grows: copy it to keep it
    num_prompt_tokens: int
    suppressed_token_ids: tuple[int, ...] = ()  # not sampled at positions below `suppress_until` (min_tokens)
    suppress_until: int = 0


class BatchItem(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request's share of a step: compute K/V for positions [start, end).

    A struct, not a dataclass: a step makes hundreds of them, and a struct costs a tenth of a dataclass.
    """

    slot: SlotId
    token_ids: Sequence[int]  # the tokens at [start, end); empty: see `takes_sampled`
    start: int  # K/V of [0, start) is in the pages, at the latest when the pending batch is finished
    page_ids: Sequence[int]  # pages of positions [0, end), perhaps more
    samples: bool  # whether the next token is sampled; False: the chunk does not end the sequence
    score_from: int | None = None  # first position whose token is scored (prompt_logprobs), in (start, end]
    scored_token_ids: Sequence[int] = ()  # the scored tokens, from `score_from` on; the last may be the token at `end`

    @property
    def takes_sampled(self) -> bool:
        """Whether the item's one token is the one that was sampled last in its slot, perhaps by the pending batch."""
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
    """Carried out in this order: slots are ended, slots are started, items are run. One batch may end and start a
    slot."""

    step_id: int
    ended: tuple[SlotId, ...] = ()
    started: tuple[StartRequest, ...] = ()
    items: tuple[BatchItem, ...]  # decodes (one token each) first, then prefill chunks

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)
