"""What binds the ranks of a tensor-parallel engine: their processes, the file where they meet, and their end.

    rank 0: start ─► meet ─► send(batch) a step ─► close: their standard input ends, and so do they
    rank n: spec on standard input ─► meet ─► launch for each frame ─► end of input: exit

Frames go over standard input: a pipe that the kernel closes when rank 0 is gone, however it went; `exit_with_rank_0`
sees to it that a rank which is stuck on its device ends then, too. Tensors travel in collectives of torch.distributed:
gloo between CPUs, NCCL between GPUs, on this host only. Nobody waits for ever for a rank that has ended: rank 0 looks
after its processes whenever it waits (leader.py).
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

COLLECTIVE_TIMEOUT_S = 120.0  # the longest step
CLOSE_TIMEOUT_S = 10.0
_GRACE_S = 5.0  # from rank 0's end to the end of a rank that does not notice by itself
_BARRIER_TIMEOUT_S = 3600.0  # to load the weights; who starts the engine waits less (engine_start_timeout_s)
_POLL_S = 0.01
_FRAME = struct.Struct("<I")  # the length of what follows
_LOOPBACK = {"linux": "lo", "darwin": "lo0"}
FOLLOWER = (sys.executable, "-m", "kvist.runner.follower")


class Rendezvous:
    """A file through which the ranks tell each other how far they are; not through sockets, which anybody may join."""

    def __init__(self, path: str, *, rank: int, size: int, check: Callable[[], None] = lambda: None) -> None:
        """`check` raises when there is nobody to wait for any more."""
        self._rank = rank
        self._size = size
        self._check = check
        self._clock = MonotonicClock()
        self._store = FileStore(path, -1)

    def barrier(self, stage: str) -> None:
        """Until every rank has called it for this stage. Collectives have no such patience."""
        self._store.set(f"{stage}/{self._rank}", "here")
        everybody = [f"{stage}/{rank}" for rank in range(self._size)]
        deadline_s = self._clock.now_s() + _BARRIER_TIMEOUT_S
        while not self._store.check(everybody):
            self._check()
            if self._clock.now_s() > deadline_s:
                raise EngineError(f"not every tensor-parallel rank was {stage} within {_BARRIER_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)

    def put(self, what: str, value: str) -> None:
        """Everybody, for `told`."""
        self._store.set(f"{what} of {self._rank}", value)

    def get(self, what: str, rank: int) -> str:
        """What that rank has told. Call it after a stage that comes later there."""
        return bytes(self._store.get(f"{what} of {rank}")).decode()

    def join(self, device: torch.device) -> TensorParallel:
        """The group for collectives on `device`; once all are at hand, so that nobody waits for one that has failed."""
        self.barrier("started")
        if sys.platform in _LOOPBACK:  # their sockets are not authenticated: they must not leave the host
            os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK[sys.platform]
            os.environ.setdefault("NCCL_SOCKET_IFNAME", _LOOPBACK[sys.platform])
        return join_tensor_parallel(
            rank=self._rank, size=self._size, store=self._store, device=device, timeout_s=COLLECTIVE_TIMEOUT_S
        )


class FollowerProcesses:
    """Rank 0's hold on the others."""

    def __init__(self, rendezvous: Path) -> None:
        """`rendezvous`: the file where they meet; it goes when they do."""
        self._rendezvous = rendezvous
        self._processes: list[subprocess.Popen[bytes]] = []
        self._clock = MonotonicClock()

    def start(self, specs: Sequence[bytes], command: Sequence[str] = ()) -> None:
        """A process for each rank from 1, told its spec. They start and load while rank 0 does."""
        for rank, spec in enumerate(specs, start=1):
            # Standard output may be a parent's channel: what a follower prints goes to standard error.
            process = subprocess.Popen(command or FOLLOWER, stdin=subprocess.PIPE, stdout=2, bufsize=0)
            self._processes.append(process)
            assert process.stdin is not None
            os.set_blocking(process.stdin.fileno(), False)
            self._write(rank, _FRAME.pack(len(spec)) + spec)

    def send(self, payload: bytes) -> None:
        """To every follower, in order. Raises `EngineError` when one is gone or takes nothing any more."""
        frame = _FRAME.pack(len(payload)) + payload
        for rank in range(1, len(self._processes) + 1):
            self._write(rank, frame)

    def check_alive(self) -> None:
        """Raises `EngineError` when a follower has ended."""
        for rank, process in enumerate(self._processes, start=1):
            if process.poll() is not None:
                raise EngineError(
                    f"tensor-parallel rank {rank} ended with status {process.returncode}: its log says why. "
                    "Restart the worker"
                )

    def _write(self, rank: int, frame: bytes) -> None:
        process = self._processes[rank - 1]
        assert process.stdin is not None
        left, deadline_s = memoryview(frame), self._clock.now_s() + COLLECTIVE_TIMEOUT_S
        while left:
            try:
                left = left[os.write(process.stdin.fileno(), left) :]
            except BlockingIOError:  # it is still at the frames before
                self.check_alive()
                if self._clock.now_s() > deadline_s:
                    message = f"tensor-parallel rank {rank} took no step for {COLLECTIVE_TIMEOUT_S:.0f} s"
                    raise EngineError(f"{message}. Restart the worker") from None
                time.sleep(_POLL_S / 10)
            except BrokenPipeError as error:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(CLOSE_TIMEOUT_S)
                self.check_alive()
                raise EngineError(f"tensor-parallel rank {rank} closed its input. Restart the worker") from error

    def close(self, *, kill: bool = False) -> None:
        """Their input ends, and they do; rank 0 leaves the group with them. Graphs that hold collectives must be gone:
        the group does not end before them. `kill`: nobody waits for what is under way, and collectives break off."""
        leaving = threading.Thread(
            target=leave_tensor_parallel, kwargs={"abort": kill}, name="kvist-leave", daemon=True
        )
        leaving.start()  # a thread, because it may wait for a rank that does not answer
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
    """What rank 0 sent, until it closes the pipe or dies."""
    while len(header := stream.read(_FRAME.size)) == _FRAME.size:
        (length,) = _FRAME.unpack(header)
        payload = stream.read(length)
        if len(payload) < length:
            return
        yield payload


def exit_with_rank_0(descriptor: int) -> None:
    """From now on this process ends soon after the other end of its pipe was closed, whatever it waits for then."""

    def watch() -> None:
        poll = select.poll()
        poll.register(descriptor, 0)  # told of the other end's end only, and without reading
        poll.poll()
        time.sleep(_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="kvist-rank-0-watch", daemon=True).start()
