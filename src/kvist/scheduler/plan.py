"""The output of a scheduler: one `Plan` a step. The worker loop carries it out in the order of its fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvist.kv.moves import TierJob
from kvist.request import EpochId, HandoffId, RequestId, SamplingParams
from kvist.wire import Ended, PoolAddress, SourceToTarget, TargetToSource, TokenChunk


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


@dataclass(frozen=True, slots=True, kw_only=True)
class WritePages:
    """Copy our pages into a peer's pool; reported back by `WritesCompleted` or `WritesFailed`."""

    handoff_id: HandoffId
    pool: PoolAddress
    page_ids: tuple[int, ...]  # ours
    peer_page_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyPages:
    """Checksum our pages, in order; reported back by `PagesVerified`."""

    handoff_id: HandoffId
    page_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWrites:
    """Drop the writes of this handoff that have not started, then report `WritesCompleted` for the finished ones.

    The first `WritesCompleted` after this plan is the answer (transfer/__init__.py): no byte is written after it."""

    handoff_id: HandoffId


@dataclass(frozen=True, slots=True, kw_only=True)
class ToSource:
    """A message from a decode engine to the prefill engine at `endpoint`."""

    endpoint: str
    message: TargetToSource
    repeated: bool = False  # the message was sent before, and may have arrived


@dataclass(frozen=True, slots=True, kw_only=True)
class ToTarget:
    """A message from a prefill engine to the decode engine of the epoch `target_epoch`."""

    target_epoch: EpochId
    message: SourceToTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class Flush:
    call_id: str
    num_pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    chunks: tuple[TokenChunk, ...] = ()  # to the gateways
    ended: tuple[Ended, ...] = ()
    flushes: tuple[Flush, ...] = ()
    messages: tuple[ToSource | ToTarget, ...] = ()  # to peer engines
    transfers: tuple[WritePages | VerifyPages | StopWrites, ...] = ()
    moves: tuple[TierJob, ...] = ()  # tier jobs: copies between device pool, host tier and store
    watched_epochs: frozenset[EpochId] = frozenset()  # report the death of these peers until the next plan
    cached_added: tuple[bytes, ...] = ()  # page digests that became cached in this step
    cached_removed: tuple[bytes, ...] = ()
    batch: Batch | None = None  # to run after the pending batch, if there is one
    wake_at_s: float | None = None  # call `step` again by then even without events
