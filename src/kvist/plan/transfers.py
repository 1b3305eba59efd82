"""Transfers of pages between engines: the jobs and messages of a plan, and the reports on the jobs."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.request import EpochId, HandoffId
from kvist.wire import PoolAddress, SourceToTarget, TargetToSource


@dataclass(frozen=True, slots=True, kw_only=True)
class WritePages:
    """Copy our pages into a peer's pool by the address's transport. Report: `WritesCompleted` or `WritesFailed`."""

    handoff_id: HandoffId
    pool: PoolAddress
    page_ids: tuple[int, ...]  # ours
    peer_page_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyPages:
    """Compute the checksum of our pages, in order, and compare it with the writer's. Report: `PagesVerified`."""

    handoff_id: HandoffId
    page_ids: tuple[int, ...]
    transport: str  # that wrote the pages: the digest of a page depends on it
    checksum: str = ""  # the writer's; empty: nothing to compare
    page_digests: bytes = b""  # the writer's, if it sent them


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWrites:
    """Drop the writes of this handoff that have not begun. Report: `WritesCompleted` for the finished writes.

    The first `WritesCompleted` after this plan is the report (transfer/transport.py): no byte is written after it."""

    handoff_id: HandoffId


@dataclass(frozen=True, slots=True, kw_only=True)
class ToSource:
    """A message from a decode engine to the prefill engine at `endpoint`."""

    endpoint: str
    message: TargetToSource
    repeated: bool = False  # the message was sent before and may have arrived


@dataclass(frozen=True, slots=True, kw_only=True)
class ToTarget:
    """A message from a prefill engine to the decode engine of the epoch `target_epoch`."""

    target_epoch: EpochId
    message: SourceToTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class WritesCompleted:
    """The first `num_pages` of the pages to be written for this handoff are in the peer's pool."""

    handoff_id: HandoffId
    num_pages: int  # cumulative
    checksum: str  # over those pages, in order
    page_digests: bytes = b""  # one per page, shortened (transfer/checksum.py); empty for a path in local memory


@dataclass(frozen=True, slots=True, kw_only=True)
class WritesFailed:
    """The transport failed; it writes no more bytes for this handoff."""

    handoff_id: HandoffId
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesVerified:
    handoff_id: HandoffId
    checksum: str  # over the granted pages as they are in our pool now
    num_intact: int = 0  # if the checksum differs: pages before the first whose digest differs; 0 without digests


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerDied:
    """The process with this epoch has certainly ended: it can neither write nor read pages any more."""

    epoch: EpochId


TransferReport = WritesCompleted | WritesFailed | PagesVerified
