"""How long are the pages of a Mooncake store away when the store is restarted in order?

    python bench/bench_pool_restart.py [--gib 1] [--page-mib 1] [--repetitions 3]

Starts a master and one store with an SSD, puts pages, and restarts the store by SIGTERM. Measures the parts of the time
without pages: from the end of the old process to the new one's `/ready`, of which most is the start of Python, and the
time to join the pool, with all pages. Prints JSON with one row a repetition. Two sizes show the time of each GiB.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from kvist.cluster.ports import free_ports
from kvist.mooncake.requirements import load

_MIB, _GIB = 1 << 20, 1 << 30
_JOINED = re.compile(r"joined the pool of .* within (?P<seconds>[\d.]+) s")


def start(log: Path, *argv: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen([sys.executable, "-m", "kvist", *argv], stdout=output, stderr=output)


def wait_ready(port: int) -> None:
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=1, trust_env=False).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.005)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--page-mib", type=float, default=1.0)
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_args()
    page_bytes = int(given.page_mib * _MIB)
    names = [f"page-{index}" for index in range(int(given.gib * _GIB / page_bytes))]
    http_port, rpc_port, store_port = free_ports(3)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ssd, log = Path(folder, "ssd"), Path(folder, "log")
        ssd.mkdir()
        store_argv = (
            *("store", f"--port={store_port}", f"--segment-size={given.gib * 1.4 + 0.1}", f"--ssd-path={ssd}"),
            *(f"--hicache-mooncake-master-addr=127.0.0.1:{rpc_port}", f"--ssd-size={given.gib * 2 + 1}"),
            f"--hicache-mooncake-master-url=http://127.0.0.1:{http_port}",
        )
        master = start(log, "master", f"--port={http_port}", f"--rpc-port={rpc_port}")
        store = start(log, *store_argv)
        wait_ready(store_port)
        client = load("mooncake.store").MooncakeDistributedStore()
        assert client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", f"127.0.0.1:{rpc_port}") == 0
        page = (ctypes.c_char * page_bytes)()
        assert client.register_buffer(ctypes.addressof(page), page_bytes) == 0
        for name in names:
            ctypes.memmove(page, os.urandom(page_bytes), page_bytes)
            assert client.put_from(name, ctypes.addressof(page), page_bytes) == 0, name
        for _ in range(given.repetitions):
            began_s = time.perf_counter()
            store.terminate()
            store.wait()
            stopped_s = time.perf_counter()
            store = start(log, *store_argv)
            found_s = None
            while found_s is None or sum(client.batch_is_exist(names)) < len(names):
                found_s = time.perf_counter()
                time.sleep(0.002)
            found_s = time.perf_counter()
            wait_ready(store_port)
            joined = _JOINED.findall(log.read_text(errors="replace"))
            rows.append(
                {
                    "stop_s": round(stopped_s - began_s, 3),
                    "start_to_all_pages_s": round(found_s - stopped_s, 3),
                    "start_to_ready_s": round(time.perf_counter() - stopped_s, 3),
                    "join_s": float(joined[-1]),
                }
            )
        store.terminate()
        store.wait()
        master.terminate()
        master.wait()
    join_ms = statistics.median(row["join_s"] * 1e3 for row in rows)
    print(json.dumps({"hardware": platform.machine(), "settings": vars(given), "rows": rows}))
    print(f"{len(names)} pages, {given.gib:g} GiB: joined the pool again in {join_ms:.0f} ms")
    sys.stdout.flush()
    os._exit(0)  # the library's threads would take seconds to end


if __name__ == "__main__":
    sys.exit(main())
