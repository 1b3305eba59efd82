"""The interface of transports, which copy whole pages from this engine's pool into a peer's pool.

Life cycle of a handoff at the writer: `write` once per chunk (in order), perhaps `stop`; `poll` returns the reports,
after a call of `wakeup`. At the receiver: `verify` once, after the writer has sent Done.

A transport decides nothing about ownership: the scheduler decides which pages may be written and when they may be
reused (docs/handoff.md). A transport guarantees to the scheduler:

- the jobs of one handoff run in order, copy whole pages, and add up in one running checksum;
- after `stop`, exactly one more `WritesCompleted` is reported for that handoff, and no byte is written after it;
- after `WritesFailed` no byte is written for that handoff;
- no byte is written before the peer's pool was checked to have our layout and the size that its address claims.

An engine has one `Transports` (transports.py), which holds each transport that the engine offers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import msgspec

from kvist.plan.transfers import TransferReport, VerifyPages, WritePages
from kvist.request import EpochId, HandoffId
from kvist.transfer.epoch import EpochWatch
from kvist.wire import Closed, Grant, PoolAddress

if TYPE_CHECKING:
    from kvist.memory.device_pool import DevicePool


class Transport(Protocol):
    """All methods are called by the engine loop's thread and return at once; `wakeup` may be called by any thread."""

    def write(self, job: WritePages) -> None:
        """Queue a copy into the peer's pool. Report: `WritesCompleted` (cumulative) or `WritesFailed`."""

    def verify(self, job: VerifyPages) -> None:
        """Queue a checksum over our own pages. Report: `PagesVerified`. Until then the transport may write these pages;
        from then on they are where they were granted."""

    def stop(self, handoff_id: HandoffId) -> None:
        """Drop the writes that have not begun. Report: `WritesCompleted` with the pages written so far. Earlier reports
        that were not polled are discarded, so the next `WritesCompleted` that `poll` returns is this report."""

    def poll(self) -> list[TransferReport]:
        """Return the reports since the last call, oldest first."""

    def peer_is_dead(self, epoch: EpochId) -> bool:
        """Return True only when the process of that epoch has certainly ended. False also means "unknown"."""

    def close(self) -> None:
        """Stop: no byte is written after the return. Jobs that have not begun are dropped without a report."""


class OfferedTransport(Transport, Protocol):
    """One transport of an engine: a backend of the door `TRANSPORTS`."""

    @property
    def address(self) -> PoolAddress:
        """Where peers with the same transport find our pages."""


@runtime_checkable
class Revocable(Protocol):
    """A transport whose writes may still be under way after they failed, so that a writer's access must be revoked
    before its pages are reused. All methods are called by the engine loop's thread."""

    def address_for(self, epoch: EpochId) -> PoolAddress:
        """Return the address through which the peer of that epoch may write until its access is revoked."""

    def granted(self, grant: Grant) -> Grant:
        """Return our Grant with such an address."""

    def is_unsettled(self, handoff_id: HandoffId) -> bool:
        """Return whether a write of ours for this handoff failed, so that its bytes may still be under way."""

    def settle(self, closed: Closed) -> None:
        """Revoke the access of an unsettled handoff: when this returns, none of its bytes can arrive."""

    def revoke(self, epoch: EpochId) -> None:
        """Revoke the access of a peer that is dead or silent: when this returns, none of its bytes can arrive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportContext:
    """The settings of a transport that come from its engine; the others are the transport's own options."""

    pool: DevicePool  # our pages
    address: PoolAddress  # of the pool's file, as this transport's
    runtime_dir: Path  # this host's folder of pool and lock files
    watch: EpochWatch  # of processes of this host; closed by the engine
    wakeup: Callable[[], None]  # makes the engine's loop call `poll`
    advertised_host: str  # this host's address for other hosts


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportKind:
    """The needs of a transport, known before it is made, and the function that makes it."""

    device_pairs: frozenset[tuple[str, str]]  # (device of our pool, of the peer's pool) between which it copies
    build: Callable[[TransportContext], OfferedTransport]
    same_host: bool = True  # both engines must run on one host, with one runtime folder
    settle_s: float = 0.0  # time after the end of a peer's process during which its last writes may still arrive
    splits_pages: bool = False  # knows `PoolAddress.parts`; other transports serve no pool that has parts
    obstacle: Callable[[DevicePool], str] = lambda _pool: ""  # why it cannot serve this pool; empty if it can
    only_by_name: str = ""  # why "auto" does not offer it, unless one of its options is set; empty if "auto" does

    def obstacle_for(self, pool: DevicePool) -> str:
        """Return why an engine with this pool cannot offer the transport; empty if it can."""
        device = pool.tensor.device.type
        if not any(device in pair for pair in self.device_pairs):
            ends = sorted({end for pair in self.device_pairs for end in pair})
            return f"copies between pools on {' and '.join(ends)}, and this pool is on {device}"
        if pool.address.parts and not self.splits_pages:
            return "copies whole pages, and each GPU of a tensor-parallel engine has its own heads of every page"
        return self.obstacle(pool)

    def address(self, name: str, pool: DevicePool) -> PoolAddress:
        """Return the address of the pool's file, as that of the transport `name`."""
        device = pool.tensor.device.type
        return msgspec.structs.replace(
            pool.address,
            transport=name,
            device=device,
            from_devices=tuple(sorted(ours for ours, peers in self.device_pairs if peers == device)),
            same_host=self.same_host,
        )
