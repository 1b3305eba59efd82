"""The ranks of a tensor-parallel engine: their processes, the file through which they synchronise, their exit.

    rank 0: start ─► barrier ─► send(batch) per step ─► close: closes their standard input, and the followers exit
    rank n: spec on standard input ─► barrier ─► launch for each frame ─► end of input: exit

Frames are sent over standard input, a pipe that the kernel closes when rank 0 ends for any reason. With
`exit_with_rank_0` even a rank that is stuck on its device then exits. Tensors are exchanged in collectives of
torch.distributed, on this host only: gloo between CPUs, NCCL between GPUs. No rank waits forever for a rank that has
ended: rank 0 checks the other processes whenever it waits (leader.py).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from kvist.clock import MonotonicClock
from kvist.errors import EngineError
from kvist.models.parallel import TensorParallel, join_tensor_parallel, leave_tensor_parallel

COLLECTIVE_TIMEOUT_S = 120.0  # the longest allowed step
CLOSE_TIMEOUT_S = 10.0
_GRACE_S = 5.0  # from the end of rank 0 to the exit of a rank that does not read its input
# Includes loading the weights; the parent of the engine waits less (engine_start_timeout_s).
_BARRIER_TIMEOUT_S = 3600.0
_POLL_S = 0.01
_FRAME = struct.Struct("<I")  # the length of the payload
_LOOPBACK = {"linux": "lo", "darwin": "lo0"}
FOLLOWER = (sys.executable, "-m", "kvist.runner.follower")


class Rendezvous:
    """Synchronises the ranks and exchanges values through a file, not a socket, which any process could connect to."""

    def __init__(self, path: str, *, rank: int, size: int, check: Callable[[], None] = lambda: None) -> None:
        """`check` raises an error if another rank has ended."""
        self._rank = rank
        self._size = size
        self._check = check
        self._clock = MonotonicClock()
        self._store = FileStore(path, -1)

    def barrier(self, stage: str) -> None:
        """Wait until every rank has called `barrier` for `stage`. Not a collective, which would time out while a rank
        loads. Raises `EngineError` after `_BARRIER_TIMEOUT_S`."""
        self._store.set(f"{stage}/{self._rank}", "here")
        all_ranks = [f"{stage}/{rank}" for rank in range(self._size)]
        deadline_s = self._clock.now_s() + _BARRIER_TIMEOUT_S
        while not self._store.check(all_ranks):
            self._check()
            if self._clock.now_s() > deadline_s:
                raise EngineError(f"not all tensor-parallel ranks were {stage} within {_BARRIER_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)

    def put(self, name: str, value: str) -> None:
        """Publish a value of this rank to all ranks."""
        self._store.set(f"{name} of {self._rank}", value)

    def get(self, name: str, rank: int) -> str:
        """Return the value that `rank` has published. A barrier must lie between that rank's `put` and this call."""
        return bytes(self._store.get(f"{name} of {rank}")).decode()

    def join(self, device: torch.device) -> TensorParallel:
        """Join the group for collectives on `device`. A barrier comes first: no rank waits for a failed rank."""
        self.barrier("started")
        # The sockets of gloo and NCCL are not authenticated: bind them to the loopback device.
        if sys.platform in _LOOPBACK:
            os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK[sys.platform]
            os.environ.setdefault("NCCL_SOCKET_IFNAME", _LOOPBACK[sys.platform])
        return join_tensor_parallel(
            rank=self._rank, size=self._size, store=self._store, device=device, timeout_s=COLLECTIVE_TIMEOUT_S
        )


class FollowerProcesses:
    """The processes of the other ranks. Owned by rank 0."""

    def __init__(self, rendezvous: Path) -> None:
        """`rendezvous`: the file through which the ranks synchronise; `close` removes it."""
        self._rendezvous = rendezvous
        self._processes: list[subprocess.Popen[bytes]] = []
        self._clock = MonotonicClock()

    def start(self, specs: Sequence[bytes], command: Sequence[str] = ()) -> None:
        """Start a process for each rank from 1 and send its spec. All ranks load their weights at the same time."""
        for rank, spec in enumerate(specs, start=1):
            # Standard output may be a parent's channel, so the output of a follower goes to standard error.
            process = subprocess.Popen(command or FOLLOWER, stdin=subprocess.PIPE, stdout=2, bufsize=0)
            self._processes.append(process)
            assert process.stdin is not None
            os.set_blocking(process.stdin.fileno(), False)
            self._write(rank, _FRAME.pack(len(spec)) + spec)

    def send(self, payload: bytes) -> None:
        """Send a frame to every follower. Raises `EngineError` when a follower has ended or has stopped reading."""
        frame = _FRAME.pack(len(payload)) + payload
        for rank in range(1, len(self._processes) + 1):
            self._write(rank, frame)

    def check_alive(self) -> None:
        """Raises `EngineError` when a follower has ended."""
        for rank, process in enumerate(self._processes, start=1):
            if process.poll() is not None:
                raise EngineError(
                    f"tensor-parallel rank {rank} ended with status {process.returncode}: see its log. "
                    "Restart the worker"
                )

    def _write(self, rank: int, frame: bytes) -> None:
        process = self._processes[rank - 1]
        assert process.stdin is not None
        left, deadline_s = memoryview(frame), self._clock.now_s() + COLLECTIVE_TIMEOUT_S
        while left:
            try:
                left = left[os.write(process.stdin.fileno(), left) :]
            except BlockingIOError:  # the pipe is full: the follower is still reading earlier frames
                self.check_alive()
                if self._clock.now_s() > deadline_s:
                    message = f"tensor-parallel rank {rank} has read no input for {COLLECTIVE_TIMEOUT_S:.0f} s"
                    raise EngineError(f"{message}. Restart the worker") from None
                time.sleep(_POLL_S / 10)
            except BrokenPipeError as error:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(CLOSE_TIMEOUT_S)
                self.check_alive()
                raise EngineError(f"tensor-parallel rank {rank} closed its input. Restart the worker") from error

    def close(self, *, kill: bool = False) -> None:
        """Close the input of the followers, so that they exit; rank 0 leaves the group with them. Graphs that contain
        collectives must be dropped before, because the group cannot end while they exist. `kill`: do not wait for
        running steps, and abort their collectives."""
        leaving = threading.Thread(
            target=leave_tensor_parallel, kwargs={"abort": kill}, name="kvist-leave", daemon=True
        )
        leaving.start()  # in a thread, because it may wait for a rank that does not answer
        deadline_s = self._clock.now_s() + CLOSE_TIMEOUT_S
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(0 if kill else max(0.0, deadline_s - self._clock.now_s()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []
        leaving.join(1.0 if kill else CLOSE_TIMEOUT_S)
        self._rendezvous.unlink(missing_ok=True)


def new_rendezvous_path(runtime_dir: Path) -> Path:
    return runtime_dir / f"tp-{os.getpid()}-{secrets.token_hex(4)}"


# ---------------------------------------------------------------- at a follower


def frames(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the payload of each frame from rank 0, until the pipe is closed."""
    while len(header := stream.read(_FRAME.size)) == _FRAME.size:
        (length,) = _FRAME.unpack(header)
        payload = stream.read(length)
        if len(payload) < length:
            return
        yield payload


def exit_with_rank_0(descriptor: int) -> None:
    """Make this process exit `_GRACE_S` after rank 0 has closed the pipe, even if it is stuck in a call."""

    def watch() -> None:
        poll = select.poll()
        poll.register(descriptor, 0)  # without POLLIN: reports only that the other end was closed
        poll.poll()
        time.sleep(_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="kvist-rank-0-watch", daemon=True).start()
