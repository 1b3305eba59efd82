"""The ranks of a tensor-parallel engine beyond rank 0, each a process of its own.

    rank 0: start ─► join ─► broadcast(items) a step ─► close: their standard input ends, and so do they
    rank n: spec on standard input ─► join, load ─► for each frame one forward ─► end of input: exit

Rank 0 schedules and samples. Followers get what a forward needs and nothing else, over their standard input: a pipe
that the kernel closes when rank 0 is gone, however it went. The tensors travel in collectives of torch.distributed,
bound to loopback. A follower that fails exits, which fails rank 0's next collective.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch.distributed as dist

from kvist.checkpoint import CheckpointKind
from kvist.errors import EngineError
from kvist.models.parallel import TensorParallel, join_tensor_parallel, leave_tensor_parallel
from kvist.runner.inputs import ForwardItem
from kvist.wire import PoolAddress

COLLECTIVE_TIMEOUT_S = 120.0
_CLOSE_TIMEOUT_S = 10.0
_LENGTH = struct.Struct("<I")


class RankSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a rank must know to load its share; equal on all ranks but for `rank`."""

    checkpoint_path: str
    checkpoint_kind: CheckpointKind
    dtype: str
    device: str
    load_format: str
    attention_backend: str
    page_size: int
    random_seed: int
    num_threads: int  # of this rank; 0: torch's own choice
    rendezvous: str  # FollowerProcesses.start: a folder in, the file where the ranks meet out
    size: int = 1
    rank: int = 0
    pool: PoolAddress | None = None  # set when size > 1


def join(spec: RankSpec) -> TensorParallel:
    """Meet the other ranks; all of them call it."""
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if loopback is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback  # its sockets are not authenticated: they must not leave the host
    return join_tensor_parallel(
        rank=spec.rank,
        size=spec.size,
        init_method=f"file://{spec.rendezvous}",
        backend="gloo",
        timeout_s=COLLECTIVE_TIMEOUT_S,
    )


class FollowerProcesses:
    """Rank 0's hold on the others."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], rendezvous: Path) -> None:
        self._processes = processes
        self._rendezvous = rendezvous

    @classmethod
    def start(cls, spec: RankSpec) -> tuple[RankSpec, FollowerProcesses]:
        """Start ranks [1, size); returns rank 0's spec too. They load while rank 0 does."""
        rendezvous = Path(spec.rendezvous) / f"tp-{os.getpid()}-{secrets.token_hex(4)}"
        spec = msgspec.structs.replace(spec, rendezvous=str(rendezvous))
        command = [sys.executable, "-m", "kvist.runner.follower"]
        followers = cls([], rendezvous)
        for rank in range(1, spec.size):
            # Standard output may be a parent's channel: what a follower prints goes to standard error.
            followers._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2))
            followers._send(msgspec.msgpack.encode(msgspec.structs.replace(spec, rank=rank)))
        return spec, followers

    def broadcast(self, items: list[ForwardItem]) -> None:
        """Have every follower join this forward. Raises `EngineError` when one is gone."""
        payload = msgspec.msgpack.encode(items)
        for rank in range(len(self._processes)):
            self._send(payload, rank)

    def check_alive(self) -> None:
        """Raises `EngineError` when a follower has ended."""
        for rank, process in enumerate(self._processes, start=1):
            if process.poll() is not None:
                raise EngineError(
                    f"tensor-parallel rank {rank} ended with status {process.returncode}: its log says why. "
                    "Restart the worker"
                )

    def _send(self, payload: bytes, index: int = -1) -> None:
        stream = self._processes[index].stdin
        assert stream is not None
        try:
            stream.write(_LENGTH.pack(len(payload)) + payload)
            stream.flush()
        except BrokenPipeError as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._processes[index].wait(_CLOSE_TIMEOUT_S)
            self.check_alive()
            raise EngineError("a tensor-parallel rank closed its input. Restart the worker") from error

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []
        if dist.is_initialized():  # not when loading failed before the ranks met
            leave_tensor_parallel(TensorParallel(rank=0, size=dist.get_world_size()))
        self._rendezvous.unlink(missing_ok=True)


def frames(stream: BinaryIO) -> Iterator[bytes]:
    """What rank 0 sent, until it closes the pipe or dies."""
    while len(header := stream.read(_LENGTH.size)) == _LENGTH.size:
        (length,) = _LENGTH.unpack(header)
        payload = stream.read(length)
        if len(payload) < length:
            return
        yield payload
