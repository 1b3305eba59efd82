"""Engines and ranks that need no second import of torch: one process imports what an engine needs, and forks them.

    test ──(one message: arguments, environment, three pipes)──► python -m tests.preloaded ──fork──► engine

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
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NoReturn

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

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Close the pipes."""
        self.stdin.close()
        if self.stdout is not None:
            self.stdout.close()


def start_engine(*, num_followers: int = 0, network: str | None = None) -> Process:
    """Start an engine. `network`: the name of its network namespace, else that of this process."""
    wish = {"program": ("-m", "kvist.engine"), "num_followers": num_followers, "network": network}
    read, write = os.pipe()
    try:
        engine = _start(wish, write)
    finally:
        os.close(write)
    engine.stdout = os.fdopen(read, "rb")
    return engine


def start_python(command: Sequence[str], **_options: object) -> Process:
    """Stand in for `subprocess.Popen` of `python -m MODULE ...` or `python -c PROGRAM`, whose output goes to standard
    error."""
    executable, *program = command
    assert executable == sys.executable
    return _start({"program": program, "num_followers": 0, "network": None}, 2)


def start_kvist(arguments: Sequence[str], log: BinaryIO) -> Process:
    """Start `kvist ARGUMENTS`, whose output goes to the log."""
    wish = {"program": ("-m", "kvist", *arguments), "num_followers": 0, "network": None}
    return _start(wish, log.fileno(), log.fileno())


POPEN = SimpleNamespace(  # in the place of the module `subprocess`
    Popen=start_python, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
)


def _start(wish: dict[str, object], stdout: int, stderr: int = 2) -> Process:
    read, write = os.pipe()
    try:
        pid = _server().fork(json.dumps({**wish, "environment": dict(os.environ)}).encode(), (read, stdout, stderr))
    finally:
        os.close(read)
    return Process(pid, os.fdopen(write, "wb"))


class _Server:
    """The process that forks. Owned by this process, whose end is its end."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.preloaded", str(theirs.fileno())],
            cwd=Path(__file__).parents[1],
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
    import kvist.cli
    import kvist.engine.assembly
    import kvist.engine.process
    import kvist.nodes.master
    import kvist.nodes.store
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
                    _become(json.loads(message), pipes.tolist())
                os.write(write, str(pid).encode())
                os._exit(0)
            for each in (*pipes, write):
                os.close(each)
            os.wait()  # now the engine is the test's child
            channel.send(os.read(read, 64))
            os.close(read)


def _become(wish: dict[str, Any], pipes: list[int]) -> None:
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
    _run(*wish["program"])


def _enter(network: str) -> None:
    from tests.engine.link import enter

    descriptor = os.open(f"/var/run/netns/{network}", os.O_RDONLY)
    enter(descriptor)
    os.close(descriptor)


def _fork_follower(others: Sequence[Process]) -> Process:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        for other in others:
            other.stdin.close()
        os.dup2(read, 0)
        os.dup2(2, 1)
        os.close(read)
        os.close(write)
        _run("-m", "kvist.runner.follower")
    os.close(read)
    return Process(pid, os.fdopen(write, "wb", buffering=0))


def _run(kind: str, text: str, *arguments: str) -> NoReturn:
    """Run `python -m text arguments` or `python -c text` in this process, to its end."""
    sys.argv = [text, *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status: object = 1
    try:
        if kind == "-m":
            runpy.run_module(text, run_name="__main__", alter_sys=True)
        else:
            exec(text, {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = 0 if end.code is None else end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
