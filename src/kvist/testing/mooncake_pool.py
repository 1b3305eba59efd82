"""A real Mooncake pool on loopback: a master and stores, each a process that a test may kill, stop and start again.

    with MooncakePool(folder, num_stores=3) as pool:
        MooncakeStoreOptions(mooncake_master_addr=pool.master)
        pool.stores[0].signal(signal.SIGKILL)

    python -m kvist.testing.mooncake_pool HOST:PORT SEGMENT_BYTES     one store

Needs the extra `kvist[mooncake]` and a Linux. Memory and ports go when the pool is closed.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from kvist.cluster.ports import free_ports
from kvist.mooncake.requirements import load

START_S = 30.0
CLIENT_TTL_S = 2  # a store that sends no heartbeat for this time is forgotten


_FIRST_PORT, _NUM_PORTS, _PORTS_OF_ONE = 12_300, 2_000, 20
_processes = itertools.count()


def _ports_of_its_own() -> dict[str, str]:
    """Return variables that give the library ports which no earlier pool of this process had: it remembers the stores
    that it wrote to by address, and takes a new store at the address of a dead one for that one."""
    first = _FIRST_PORT + next(_processes) * _PORTS_OF_ONE % _NUM_PORTS
    return {"MC_STORE_CLIENT_MIN_PORT": str(first), "MC_STORE_CLIENT_MAX_PORT": str(first + _PORTS_OF_ONE - 1)}


class PoolProcess:
    """A process of the pool. Its output goes to a file."""

    def __init__(self, argv: list[str], log: Path) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "MC_LOG_LEVEL": "ERROR", **_ports_of_its_own()},
            )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: int) -> None:
        """Send the signal, and return when it has had its effect."""
        self._process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self._process.wait(START_S)
        elif number == signal.SIGSTOP:
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def last_output(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def end(self) -> None:
        if self.is_running:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
        self._process.wait(START_S)


class MooncakePool:
    """A master and stores. Mutable; the test's."""

    def __init__(
        self,
        folder: Path,
        *,
        num_stores: int = 1,
        segment_bytes: int = 64 << 20,
        master_flags: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder
        self._num_stores = num_stores
        self._segment_bytes = segment_bytes
        self._flags = {"client_ttl": str(CLIENT_TTL_S), **(master_flags or {})}
        self._num_started = 0
        self._port, self.metrics_port = free_ports(2)
        self.master = f"127.0.0.1:{self._port}"
        self.stores: list[PoolProcess] = []
        self.master_process = self.start_master()
        try:
            for _ in range(num_stores):
                self.start_store(wait=False)
            self._wait_until(lambda: self.num_segments() == num_stores, "the master does not know the stores")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> MooncakePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start_master(self) -> PoolProcess:
        """Start the master, also again after it was killed."""
        flags = {
            "rpc_address": "127.0.0.1",
            "rpc_port": str(self._port),
            "metrics_host": "127.0.0.1",
            "metrics_port": str(self.metrics_port),
            **self._flags,
        }
        program = str(Path(sys.executable).with_name("mooncake_master"))
        argv = [program, "--logtostderr", *(f"--{name}={value}" for name, value in flags.items())]
        self.master_process = self._start(argv, "master")
        self._wait_until(lambda: self.num_segments() >= 0, "the master does not answer")
        return self.master_process

    def start_store(self, *, segment_bytes: int | None = None, wait: bool = True) -> PoolProcess:
        num_bytes = segment_bytes or self._segment_bytes
        argv = [sys.executable, "-m", "kvist.testing.mooncake_pool", self.master, str(num_bytes)]
        store = self._start(argv, "store")
        self.stores.append(store)
        if wait:
            self._wait_until(lambda: self.num_segments() >= len(self.stores), "the master does not know the store")
        return store

    def restore(self) -> None:
        """Let the master and as many stores as at first run again, after any test."""
        for each in [*self.stores, self.master_process]:
            if each.is_running:
                each.signal(signal.SIGCONT)
        if not self.master_process.is_running:
            self.start_master()
        self.stores[:] = [store for store in self.stores if store.is_running]
        self._wait_until(lambda: self.num_segments() == len(self.stores), "the master does not forget dead stores")
        while len(self.stores) < self._num_stores:
            self.start_store(wait=False)
        self._wait_until(lambda: self.num_segments() == len(self.stores), "the master does not know the stores")

    def num_segments(self) -> int:
        """Return how many stores the master knows: also dead ones, for `CLIENT_TTL_S`."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.metrics_port}/get_all_segments", timeout=2.0
            ) as answer:
                return len(answer.read().split())
        except OSError:
            return -1

    def close(self) -> None:
        for each in [*self.stores, self.master_process]:
            each.end()

    def _wait_until(self, condition: Callable[[], bool], problem: str) -> None:
        give_up_s = time.monotonic() + START_S
        while not condition():
            for each in [*self.stores, self.master_process]:
                assert each.is_running, f"{problem}: {each.last_output()}"
            assert time.monotonic() < give_up_s, f"{problem}: {self.master_process.last_output()}"
            time.sleep(0.02)

    def _start(self, argv: list[str], name: str) -> PoolProcess:
        self._num_started += 1
        return PoolProcess(argv, self._folder / f"{name}-{self._num_started}.log")


def main() -> None:
    master, segment_bytes = sys.argv[1], int(sys.argv[2])
    store = load("mooncake.store").MooncakeDistributedStore()
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, 0, "tcp", "", master)
    print("store is ready" if code == 0 else f"the master refuses the store: {code}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
