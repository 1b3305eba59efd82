"""One pool of real processes for the whole session: `kvist master`, three `kvist store`s with SSDs, and a client."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvist.cluster.ports import free_ports
from kvist.mooncake.master_admin import MasterAdmin
from kvist.mooncake.requirements import library_obstacle
from kvist.testing.waits import wait_until
from tests.preloaded import Process, start_kvist

WITHIN_S = 120.0  # on a busy machine, where Python alone may take half a minute to start
NUM_STORES = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the pool, and skip them where Mooncake cannot run."""
    reason = library_obstacle()
    for item in items:
        if item.nodeid.startswith("tests/nodes/") and "pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.e2e)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


class Server:
    """A `kvist` process with HTTP."""

    def __init__(self, log: Path, port: int, argv: Sequence[str]) -> None:
        self.url, self.name, self._log, self._argv = f"http://127.0.0.1:{port}", f"127.0.0.1:{port}", log, argv
        self.process: Process | None = None

    def start(self) -> None:
        assert self.process is None
        with self._log.open("ab") as log:
            self.process = start_kvist(self._argv, log)

    def wait_ready(self, within_s: float = WITHIN_S) -> None:
        wait_until(self.is_ready, self.log, within_s=within_s)

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/ready", timeout=2, trust_env=False).status_code == httpx.codes.OK
        return False

    def stop(self) -> int:
        """Stop the process in order; return its exit status."""
        assert self.process is not None
        self.process.terminate()
        status = self.process.wait(timeout=WITHIN_S)
        self.process = None
        return status

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}{path}", timeout=10, trust_env=False)


class Client:
    """The process of pool_client.py."""

    def __init__(self, log: Path, master_addr: str) -> None:
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("pool_client.py")), master_addr],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                bufsize=1,
            )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def put(self, names: Sequence[str], *, store: str | None = None) -> int:
        return int(self._ask(call="put", names=list(names), store=store))

    def check(self, names: Sequence[str]) -> dict[str, int]:
        return dict(self._ask(call="check", names=list(names)))

    def _ask(self, **call: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Pool:
    """A master, stores and a client. Tests leave every process running and ready."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        http_port, rpc_port, *self._store_ports = free_ports(2 + NUM_STORES + 2)
        self.master_addr = f"127.0.0.1:{rpc_port}"
        self.master = Server(folder / "master.log", http_port, self._master_argv(http_port, rpc_port))
        self.stores = [self.new_store(index) for index in range(NUM_STORES)]
        self.admin = MasterAdmin(self.master.url)
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        assert self._client is not None, "the pool has not started"
        return self._client

    @staticmethod
    def _master_argv(http_port: int, rpc_port: int) -> list[str]:
        return ["master", f"--port={http_port}", f"--rpc-port={rpc_port}", "--store-ttl-s=2", "--read-lease-s=1"]

    def new_store(self, index: int, *, ssd_gb: float = 0.5) -> Server:
        ssd, port = self.folder / f"ssd-{index}", self._store_ports[index]
        ssd.mkdir()
        argv = ["store", f"--port={port}", "--segment-size=0.068", f"--ssd-path={ssd}", f"--ssd-size={ssd_gb}"]
        argv += ["--ssd-buffer-size=0.064", f"--hicache-mooncake-master-addr={self.master_addr}"]
        return Server(
            self.folder / f"store-{index}.log", port, [*argv, f"--hicache-mooncake-master-url={self.master.url}"]
        )

    def start(self) -> None:
        for server in (self.master, *self.stores):
            server.start()
        for server in (self.master, *self.stores):
            server.wait_ready()
        self._client = Client(self.folder / "client.log", self.master_addr)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        for server in (*self.stores, self.master):
            server.kill()

    def wait_on_ssd(self, names: Sequence[str]) -> None:
        """Wait until every page has its file."""
        files = {f"default_{name}" for name in names}
        wait_until(lambda: files <= {path.name for path in self.folder.glob("ssd-*/file_per_key_dir/*/*/*")})

    def status(self) -> str:
        return str(self.admin.pool_status())


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory.mktemp("pool"))
    try:
        pool.start()
        yield pool
    finally:
        pool.close()
