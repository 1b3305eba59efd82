"""The interface of transports, which copy whole pages from this engine's pool into a peer's pool.

Life cycle of a handoff at the writer: `write` once per chunk (in order), perhaps `stop`; `poll` returns the reports,
after a call of `wakeup`. At the receiver: `verify` once, after the writer has sent Done.

A transport decides nothing about ownership: the scheduler decides which pages may be written and when they may be
reused (docs/handoff.md). A transport guarantees to the scheduler:

- the jobs of one handoff run in order, copy whole pages, and add up in one running checksum;
- after `stop`, exactly one more `WritesCompleted` is reported for that handoff, and no byte is written after it;
- after `WritesFailed` no byte is written for that handoff;
- no byte is written before the peer's pool was checked to have our layout and the size that its address claims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvist.plan.transfers import TransferReport, VerifyPages, WritePages
from kvist.request import EpochId, HandoffId
from kvist.wire import PoolAddress

if TYPE_CHECKING:
    from kvist.memory.device_pool import DevicePool


class Transport(Protocol):
    """All methods are called by the engine loop's thread and return at once; `wakeup` may be called by any thread."""

    @property
    def address(self) -> PoolAddress:
        """Where peers with the same transport find our pages."""

    def write(self, job: WritePages) -> None:
        """Queue a copy into the peer's pool. Report: `WritesCompleted` (cumulative) or `WritesFailed`."""

    def verify(self, job: VerifyPages) -> None:
        """Queue a checksum over our own pages. Report: `PagesVerified`."""

    def stop(self, handoff_id: HandoffId) -> None:
        """Drop the writes that have not begun. Report: `WritesCompleted` with the pages written so far. Earlier reports
        that were not polled are discarded, so the next `WritesCompleted` that `poll` returns is this report."""

    def poll(self) -> list[TransferReport]:
        """Return the reports since the last call, oldest first."""

    def peer_is_dead(self, epoch: EpochId) -> bool:
        """Return True only when the process of that epoch has certainly ended. False also means "unknown"."""

    def close(self) -> None:
        """Stop: no byte is written after the return. Jobs that have not begun are dropped without a report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportContext:
    """The settings of a transport that come from its engine; the others are the transport's own options."""

    pool: DevicePool  # our pages
    address: PoolAddress  # of the pool's file, with the transport's name
    runtime_dir: Path  # this host's folder of pool and lock files
    wakeup: Callable[[], None]  # makes the engine's loop call `poll`


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportKind:
    """The needs of a transport, known before it is made, and the function that makes it."""

    device_type: str  # of the pools that it copies between, on both sides: "cpu" or "cuda"
    build: Callable[[TransportContext], Transport]
