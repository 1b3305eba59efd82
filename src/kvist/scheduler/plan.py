"""What a scheduler asks for: one `Plan` a step. The worker loop carries it out, in the order of the fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvist.kv.moves import TierJob
from kvist.request import EpochId, HandoffId, RequestId, SamplingParams
from kvist.wire import Ended, PoolAddress, SourceToTarget, TargetToSource, TokenChunk


class BatchItem(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request's share of a step: compute K/V for positions [start, end).

    A struct and not a dataclass: hundreds are made in each step, at a tenth of the price.
    """

    request_id: RequestId
    token_ids: Sequence[int]  # the tokens at those positions; empty: the one `takes_sampled` means
    start: int  # K/V of [0, start) is in the pages, or will be when the batch before is finished
    page_ids: Sequence[int]  # pages for positions [0, end), maybe a few more
    sampling: SamplingParams | None = None  # None: no next token wanted (a chunk that does not end the sequence)
    suppressed_token_ids: tuple[int, ...] = ()  # impossible for this next token (min_tokens)

    @property
    def takes_sampled(self) -> bool:
        """Its one token is the one that the batch before, still under way, chooses for it."""
        return not self.token_ids

    @property
    def end(self) -> int:
        """The position of the next token; also the counter of its sampling noise."""
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
    """Drop the writes of this handoff that have not begun, then report `WritesCompleted` for those that were done.

    The first `WritesCompleted` after this plan is that answer (transfer/__init__.py): no byte is written after it."""

    handoff_id: HandoffId


@dataclass(frozen=True, slots=True, kw_only=True)
class ToSource:
    """A message from a decode engine to the prefill engine at `endpoint`."""

    endpoint: str
    message: TargetToSource
    repeated: bool = False  # it was sent before, and may have arrived


@dataclass(frozen=True, slots=True, kw_only=True)
class ToTarget:
    """A message from a prefill engine to the decode engine whose life is `target_epoch`."""

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
    moves: tuple[TierJob, ...] = ()  # between the tiers
    watched_epochs: frozenset[EpochId] = frozenset()  # peers whose death must be reported while this plan stands
    cached_added: tuple[bytes, ...] = ()  # page digests that became cached in this step
    cached_removed: tuple[bytes, ...] = ()
    batch: Batch | None = None  # to be begun after the one under way, if there is one
    wake_at_s: float | None = None  # call `step` again by then even if nothing happens
