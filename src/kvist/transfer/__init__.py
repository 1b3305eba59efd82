"""Copies whole KV pages from this engine's pool into a peer's pool, and reports completion. One interface, `Transport`.

Life cycle of a handoff at the writer: `write` once per chunk (in order), perhaps `stop`; every job is answered through
`poll` after a call of `wakeup`. At the receiver: `verify` once, after the writer has sent Done.

A transport decides nothing about ownership: the scheduler decides which pages may be written and when they may be
reused (docs/handoff.md). A transport guarantees to the scheduler:

- the jobs of one handoff run in order, copy whole pages, and add up in one running checksum;
- after `stop`, exactly one more `WritesCompleted` is reported for that handoff, and no byte is written after it;
- after `WritesFailed` no byte is written for that handoff;
- no byte is written before the peer's pool was checked to have our layout and the size that its address claims.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kvist.door import Door, backend
from kvist.memory.device_pool import CUDA_IPC, SHM, DevicePool
from kvist.plan.transfers import TransferReport, VerifyPages, WritePages
from kvist.request import EpochId, HandoffId

__all__ = ["TRANSPORTS", "TransferReport", "Transport", "make_transport"]


class Transport(Protocol):
    """All methods are called by the engine loop's thread and return at once; `wakeup` may be called by any thread."""

    def write(self, job: WritePages) -> None:
        """Queue a copy into the peer's pool; answered by `WritesCompleted` (cumulative) or `WritesFailed`."""

    def verify(self, job: VerifyPages) -> None:
        """Queue a checksum over our own pages; answered by `PagesVerified`."""

    def stop(self, handoff_id: HandoffId) -> None:
        """Drop jobs that have not begun. Answered by a `WritesCompleted` with the pages written so far; earlier reports
        that were not polled are discarded, so the next `WritesCompleted` that `poll` returns is the answer."""

    def poll(self) -> list[TransferReport]:
        """Return the reports since the last call, oldest first."""

    def peer_is_dead(self, epoch: EpochId) -> bool:
        """Return True only when the process of that epoch has certainly ended. False also means "unknown"."""

    def close(self) -> None:
        """No byte is written once this returns. Jobs that have not begun are dropped without a report."""


def _shm(pool: DevicePool, runtime_dir: Path, wakeup: Callable[[], None]) -> Transport:
    from kvist.transfer.shm import shm_transport

    return shm_transport(pool, runtime_dir, wakeup)


def _cuda_ipc(pool: DevicePool, runtime_dir: Path, wakeup: Callable[[], None]) -> Transport:
    from kvist.transfer.cuda_ipc import cuda_ipc_transport

    return cuda_ipc_transport(pool, runtime_dir, wakeup)


TRANSPORTS: Door[[DevicePool, Path, Callable[[], None]], Transport] = {  # by `PoolAddress.transport`
    SHM: backend(_shm, text="between pools in the memory of one host, by mapping the peer's file"),
    CUDA_IPC: backend(_cuda_ipc, text="between pools on the GPUs of one host, by opening the peer's memory"),
}


def make_transport(pool: DevicePool, *, runtime_dir: Path, wakeup: Callable[[], None]) -> Transport:
    """Make the transport between pools of this kind. `runtime_dir` is the host's folder of pool and lock files."""
    return TRANSPORTS[pool.address.transport].make({}, pool, runtime_dir, wakeup)
