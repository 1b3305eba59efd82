"""How long are the pages of a Mooncake pool away when its nodes are restarted in order?

    python bench/bench_pool_restart.py [--gib 1] [--page-mib 1] [--repetitions 3]
    python bench/bench_pool_restart.py --what master
    python bench/bench_pool_restart.py --what stores --stores 3      # all of them, one after the other

Starts a master and stores with SSDs, puts pages, and restarts the first store, all stores or the master by SIGTERM.
Measures the end of the old process, and from then the time until all pages are listed and until the new one's `/ready`,
of which most is the start of Python. Beside it the part that depends on the pages: of a store the time to join the pool
with them, of the master the time from its first open port until all of them are listed. Then every page is read, and
must be what was put: a lost one ends the run. Prints JSON with one row a restart. Two sizes show the time of each GiB.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from kvist.cluster.ports import free_ports
from kvist.mooncake.requirements import load

_MIB, _GIB = 1 << 20, 1 << 30
_JOINED = re.compile(r"joined the pool of .* within (?P<seconds>[\d.]+) s")
_WITHIN_S = 300.0


class Node:
    """A process of the pool, which can be started again."""

    def __init__(self, name: str, folder: Path, port: int, *argv: str, rpc_port: int | None = None) -> None:
        self.name, self._port, self._rpc_port = name, port, rpc_port
        self._log = folder / f"{name}.log"
        self._argv = [sys.executable, "-m", "kvist", *argv, f"--port={port}", "--no-access-log"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(self._argv, stdout=output, stderr=output)

    def is_ready(self) -> bool:
        try:
            answer = httpx.get(f"http://127.0.0.1:{self._port}/ready", timeout=1.0, trust_env=False)
        except httpx.HTTPError:
            return False
        return answer.status_code == httpx.codes.OK

    def wait_ready(self) -> None:
        wait_for(self.is_ready, f"{self.name} is not ready")

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(_WITHIN_S)

    def wait_open(self) -> None:
        """Wait until the port of a master is open: before that, a question may wait for seconds."""
        wait_for(self._is_open, f"{self.name} does not listen")

    def _is_open(self) -> bool:
        if self._rpc_port is None:
            return True
        with socket.socket() as each:
            return each.connect_ex(("127.0.0.1", self._rpc_port)) == 0

    def join_s(self) -> float | None:
        """Return the time that a store took to join the pool, as it has logged it; None for a master."""
        joined = _JOINED.findall(self._log.read_text(errors="replace"))
        return float(joined[-1]) if joined else None


def wait_for(condition: Callable[[], bool], problem: str) -> None:
    give_up_s = time.monotonic() + _WITHIN_S
    while not condition():
        if time.monotonic() > give_up_s:
            raise TimeoutError(problem)
        time.sleep(0.005)


class Client:
    """A client of the pool. The bytes of a page follow from its number."""

    def __init__(self, master_addr: str, num_pages: int, page_bytes: int) -> None:
        self._store: Any = load("mooncake.store").MooncakeDistributedStore()
        assert self._store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master_addr) == 0
        self._page = (ctypes.c_char * page_bytes)()
        self._address, self._num_bytes = ctypes.addressof(self._page), page_bytes
        assert self._store.register_buffer(self._address, page_bytes) == 0
        self._names = [f"page-{index}" for index in range(num_pages)]

    def put_all(self) -> None:
        for index, name in enumerate(self._names):
            ctypes.memmove(self._page, self._content(index), self._num_bytes)
            assert self._store.put_from(name, self._address, self._num_bytes) == 0, name

    def lists_all(self) -> bool:
        return bool(sum(code == 1 for code in self._store.batch_is_exist(self._names)) == len(self._names))

    def check_all(self) -> None:
        for index, name in enumerate(self._names):
            assert self._store.get_into(name, self._address, self._num_bytes) == self._num_bytes, f"{name} is lost"
            assert self._page.raw == self._content(index), f"{name} is another page"

    def _content(self, index: int) -> bytes:
        return np.random.default_rng(index).bytes(self._num_bytes)


def restarted(node: Node, client: Client) -> dict[str, object]:
    began_s = time.perf_counter()
    node.stop()
    stopped_s = time.perf_counter()
    node.start()
    node.wait_open()
    open_s = time.perf_counter()
    wait_for(client.lists_all, f"not all pages are back after the restart of {node.name}")
    found_s = time.perf_counter()
    node.wait_ready()
    join_s = node.join_s()
    return {
        "node": node.name,
        "stop_s": round(stopped_s - began_s, 3),
        "start_to_all_pages_s": round(found_s - stopped_s, 3),
        "start_to_ready_s": round(time.perf_counter() - stopped_s, 3),
        "with_pages_s": round(found_s - open_s, 3) if join_s is None else join_s,
    }


def measure(given: argparse.Namespace, folder: Path, nodes: list[Node]) -> list[dict[str, object]]:
    """`nodes` takes the processes that were started."""
    http_port, rpc_port, *store_ports = free_ports(2 + given.stores)
    master_addr, page_bytes = f"127.0.0.1:{rpc_port}", int(given.page_mib * _MIB)
    nodes.append(Node("master", folder, http_port, "master", f"--rpc-port={rpc_port}", rpc_port=rpc_port))
    for index, port in enumerate(store_ports):
        ssd = folder / f"ssd-{index}"
        ssd.mkdir()
        sizes = (f"--segment-size={given.gib * 1.4 + 0.1}", f"--ssd-size={given.gib * 2 + 1}")
        joins = (
            f"--hicache-mooncake-master-addr={master_addr}",
            f"--hicache-mooncake-master-url=http://127.0.0.1:{http_port}",
        )
        nodes.append(Node(f"store-{index}", folder, port, "store", f"--ssd-path={ssd}", *sizes, *joins))
    for node in nodes:
        node.start()
    for node in nodes:
        node.wait_ready()
    num_pages = int(given.gib * _GIB / page_bytes)
    client = Client(master_addr, num_pages, page_bytes)
    client.put_all()
    wait_for(lambda: _num_files(folder) >= num_pages, "not all pages are on an SSD")
    chosen = {"store": nodes[1:2], "stores": nodes[1:], "master": nodes[:1]}[given.what]
    rows = [restarted(node, client) for _ in range(given.repetitions) for node in chosen]
    client.check_all()
    return rows


def _num_files(folder: Path) -> int:
    return sum(1 for _ in folder.glob("ssd-*/file_per_key_dir/*/*/*"))


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("store", "stores", "master"), default="store", help="what is restarted")
    parser.add_argument("--stores", type=int, default=1)
    parser.add_argument("--gib", type=float, default=1.0, help="size of all pages")
    parser.add_argument("--page-mib", type=float, default=1.0)
    parser.add_argument("--repetitions", type=int, default=3)
    return parser.parse_args(argv)


def main() -> None:
    given, nodes = parsed(), list[Node]()
    with tempfile.TemporaryDirectory(prefix="kvist-bench-restart-") as folder:
        try:
            rows = measure(given, Path(folder), nodes)
        finally:
            for node in reversed(nodes):
                node.stop()
    print(json.dumps({"hardware": platform.machine(), "settings": vars(given), "rows": rows}))
    for title in ("stop_s", "start_to_all_pages_s", "start_to_ready_s", "with_pages_s"):
        print(f"{title}: median {statistics.median(float(str(row[title])) for row in rows):.2f}")
    sys.stdout.flush()
    os._exit(0)  # the library's threads would take seconds to end


if __name__ == "__main__":
    main()
