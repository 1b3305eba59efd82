"""Engine processes that need no second import of torch: one process imports what an engine needs, and forks engines.

    test ──(one message: arguments, environment, three pipes)──► python -m tests.engine.preloaded ──fork──► engine

Everything but the import is as with `python -m kvist.engine`, which tests/e2e starts: the engine is a process and a
child of this one, its standard input and output are pipes, and it ends as always. The ranks of a tensor-parallel
engine are forked before the engine starts, and wait for their first frame.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

_SET_SUBREAPER, _GET_SUBREAPER = 36, 37
_MESSAGE_BYTES = 1 << 20
_POLL_S = 0.005


class Process:
    """A forked process: the part of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, stdin: BinaryIO, stdout: BinaryIO | None = None) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        give_up_s = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > give_up_s:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(_POLL_S)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Close the pipes."""
        self.stdin.close()
        if self.stdout is not None:
            self.stdout.close()


def start_engine(*, num_followers: int = 0, network: str | None = None) -> Process:
    """Start an engine. `network`: the name of its network namespace, else that of this process."""
    read_in, write_in = os.pipe()
    read_out, write_out = os.pipe()
    wish = {"environment": dict(os.environ), "num_followers": num_followers, "network": network}
    try:
        pid = _server().fork(json.dumps(wish).encode(), (read_in, write_out, 2))
    finally:
        os.close(read_in)
        os.close(write_out)
    return Process(pid, os.fdopen(write_in, "wb"), os.fdopen(read_out, "rb"))


class _Server:
    """The process that forks. Owned by this process, whose end is its end."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.preloaded", str(theirs.fileno())],
            cwd=Path(__file__).parents[2],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, "OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"},
        )
        theirs.close()
        atexit.register(self.close)

    def fork(self, wish: bytes, pipes: Sequence[int]) -> int:
        """Return the process of the engine, which becomes a child of this process: its first parent ends at once, and
        orphans go to the nearest ancestor that is a subreaper."""
        libc = ctypes.CDLL(None, use_errno=True)
        before = ctypes.c_int()
        libc.prctl(_GET_SUBREAPER, ctypes.byref(before), 0, 0, 0)
        libc.prctl(_SET_SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(self._socket, [wish], list(pipes))
            answer = self._socket.recv(64)
        finally:
            libc.prctl(_SET_SUBREAPER, before.value, 0, 0, 0)
        assert answer, "the process that forks engines has ended: see its standard error"
        return int(answer)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(timeout=60)


@functools.cache
def _server() -> _Server:
    return _Server()


# ---------------------------------------------------------------- in the process that forks


def serve(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the test's end is our end
    import kvist.engine.assembly
    import kvist.engine.process
    import kvist.runner.follower
    import kvist.runner.tp  # noqa: F401

    gc.collect()
    gc.freeze()  # forked processes share these objects
    assert len(os.listdir("/proc/self/task")) == 1, "only a process without threads can be forked safely"
    with socket.socket(fileno=descriptor) as channel:
        while True:
            message, ancillary, _, _ = channel.recvmsg(_MESSAGE_BYTES, socket.CMSG_SPACE(3 * array.array("i").itemsize))
            if not message:
                return
            pipes = array.array("i", ancillary[0][2][:12])
            read, write = os.pipe()
            if not os.fork():
                if not (pid := os.fork()):
                    for each in (read, write):
                        os.close(each)
                    channel.close()
                    _become_engine(json.loads(message), pipes.tolist())
                os.write(write, str(pid).encode())
                os._exit(0)
            for each in (*pipes, write):
                os.close(each)
            os.wait()  # now the engine is the test's child
            channel.send(os.read(read, 64))
            os.close(read)


def _become_engine(wish: dict[str, Any], pipes: list[int]) -> None:
    for number, descriptor in enumerate(pipes):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(wish["environment"])
    if wish["network"] is not None:
        _enter(wish["network"])
    followers: list[Process] = []
    for _ in range(wish["num_followers"]):
        followers.append(_fork_follower(followers))

    def start_follower(command: Sequence[str], **_options: object) -> Process:
        assert list(command) == list(tp.FOLLOWER), "an engine starts no other program"
        return followers.pop(0)

    tp = sys.modules["kvist.runner.tp"]
    tp.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=start_follower, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
    )
    _run("kvist.engine")


def _enter(network: str) -> None:
    from tests.engine.link import enter

    descriptor = os.open(f"/var/run/netns/{network}", os.O_RDONLY)
    enter(descriptor)
    os.close(descriptor)


def _fork_follower(others: Sequence[Process]) -> Process:
    read, write = os.pipe()
    if pid := os.fork():
        os.close(read)
        return Process(pid, os.fdopen(write, "wb", buffering=0))
    for other in others:
        other.stdin.close()
    os.dup2(read, 0)
    os.dup2(2, 1)
    os.close(read)
    os.close(write)
    _run("kvist.runner.follower")
    raise AssertionError("a follower ends by itself")


def _run(module: str) -> None:
    """Run `python -m module` in this process, to its end."""
    sys.argv = [module]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:  # the module exits by itself, unless it fails
        os._exit(1)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
