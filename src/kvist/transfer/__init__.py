"""Moves whole KV pages from this engine's pool into a peer's, and says when it is done. One door, `Transport`.

Life cycle of a handoff at the writer: `write` once a chunk (in order), perhaps `stop`; every job is answered through
`poll` after a call of `wakeup`. At the receiver: `verify` once, after the writer said that it is done.

A transport decides nothing about ownership: which pages may be written, and when they may be used again, is the
scheduler's affair (docs/handoff.md). What it owes the scheduler is this:

- the jobs of one handoff are carried out in order, whole pages each, and add up in one running checksum;
- after `stop`, exactly one more `WritesCompleted` comes for that handoff, and no byte is written after it;
- after `WritesFailed` no byte is written for that handoff;
- nothing is written before the peer's pool was found to have our layout and the size it claims.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kvist.kv.device import CUDA_IPC, DevicePool
from kvist.request import EpochId, HandoffId
from kvist.scheduler.events import TransferReport
from kvist.scheduler.plan import VerifyPages, WritePages

__all__ = ["TransferReport", "Transport", "make_transport"]


class Transport(Protocol):
    """All methods are called by the engine loop's thread and return at once; `wakeup` may be called by any thread."""

    def write(self, job: WritePages) -> None:
        """Queue a copy into the peer's pool; answered by `WritesCompleted` (cumulative) or `WritesFailed`."""

    def verify(self, job: VerifyPages) -> None:
        """Queue a checksum over our own pages; answered by `PagesVerified`."""

    def stop(self, handoff_id: HandoffId) -> None:
        """Drop what has not begun. Answered by a `WritesCompleted` for what was done; earlier ones not yet polled
        are swallowed, so the next one that `poll` returns is that answer."""

    def poll(self) -> list[TransferReport]:
        """What happened since the last call, oldest first."""

    def peer_is_dead(self, epoch: EpochId) -> bool:
        """True only when the process of that life is certainly gone. False also means "cannot tell"."""

    def close(self) -> None:
        """No byte is written once this returns. Jobs that have not begun are dropped without a report."""


def make_transport(pool: DevicePool, *, runtime_dir: Path, wakeup: Callable[[], None]) -> Transport:
    """The transport between pools like this one. `runtime_dir` is the host's folder of pool and lock files."""
    if pool.address.transport == CUDA_IPC:
        from kvist.transfer.cuda_ipc import cuda_ipc_transport

        return cuda_ipc_transport(pool, runtime_dir, wakeup)
    from kvist.transfer.shm import shm_transport

    return shm_transport(pool, runtime_dir, wakeup)
