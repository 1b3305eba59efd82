"""Starts a `kvist serve`, measures it by `kvist bench`, reads its metrics, and stops or kills it.

The server runs in a process group of its own with its output in a file, and ends when this process ends, however that
happens. Every wait has a limit. A failure raises `BenchFailure`, which ends with the last lines of the server's log.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx

from kvist.cluster.ports import free_ports

STOP_TIMEOUT_S = 30.0
REPORT_INTERVAL_S = 1.3  # workers report their counters once a second
NUM_LAST_LINES = 20
KVIST = (sys.executable, "-m", "kvist")
Report = dict[str, Any]  # what `kvist bench --json` writes


class BenchFailure(Exception):
    """The reason why a row cannot be measured."""


class BenchServer:
    """One server process. Use as a context manager: leaving it stops the server."""

    def __init__(
        self, name: str, flags: Sequence[str], logs: Path, *, verb: str = "serve", source: Path | None = None
    ) -> None:
        """`verb` of the `kvist` command. `source`: the folder `src` of another version of Kvist."""
        self.name = name
        self.port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self.argv = (*KVIST, verb, *flags, f"--port={self.port}", "--stop-with-stdin")
        self.ready_s = 0.0
        self._environ = os.environ if source is None else {**os.environ, "PYTHONPATH": str(source)}
        self._log_path = logs / f"{name.replace('+', '-').replace(' ', '-')}-{self.port}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._http = httpx.Client(base_url=self.url, trust_env=False)  # one: each reads the certificates, in 16 ms

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process is not None:
                self._process.wait(STOP_TIMEOUT_S)
        self.kill()
        self._http.close()

    def start(self, timeout_s: float) -> None:
        """Return when the server is ready; `ready_s` is the time that took."""
        start_s = time.monotonic()
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._environ,
            )
        while not self.is_ready():
            self.ready_s = time.monotonic() - start_s
            if self._process.poll() is not None:
                raise BenchFailure(
                    f"{self.name}: the server ended with status {self._process.returncode}\n{self.log_tail()}"
                )
            if self.ready_s > timeout_s:
                raise BenchFailure(f"{self.name}: not ready after {timeout_s:g} s\n{self.log_tail()}")
            time.sleep(0.05)
        self.ready_s = time.monotonic() - start_s

    def kill(self) -> None:
        """Send SIGKILL to the server and its engine, as a crash of both."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait(STOP_TIMEOUT_S)
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process = None

    def wait_ended(self) -> None:
        """Wait for the end of a server that has got a signal to stop. Raises `TimeoutExpired`."""
        if self._process is not None:
            self._process.wait(STOP_TIMEOUT_S)
            self.kill()

    def metrics(self) -> dict[str, float]:
        """Return the counters of all workers together, by their names without `kvist:worker_` and `_total`."""
        time.sleep(REPORT_INTERVAL_S)
        text = self._http.get("/metrics", timeout=10.0).raise_for_status().text
        found = re.findall(r"^kvist:worker_(\w+)_total\{[^}]*\} (\S+)$", text, re.MULTILINE)
        totals: dict[str, float] = {}
        for name, value in found:
            totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def post(self, path: str, timeout_s: float, **content: Any) -> httpx.Response:
        """Send a request through the client of this server, whose connection stays open."""
        return self._http.post(path, timeout=timeout_s, **content)

    def bench(self, argv: Sequence[str], json_path: Path, timeout_s: float) -> Report:
        """Run `kvist bench ARGV` and return its report. Raises `BenchFailure` if a request fails."""
        command = (*KVIST, "bench", *argv, f"--base-url={self.url}", f"--json={json_path}")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise BenchFailure(
                f"{self.name}: kvist bench took longer than {timeout_s:g} s\n{self.log_tail()}"
            ) from error
        if done.returncode:
            raise BenchFailure(f"{self.name}: {' '.join(command)}\n{done.stdout}\n{done.stderr}\n{self.log_tail()}")
        report: Report = json.loads(json_path.read_bytes())
        return report

    def log(self) -> str:
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def log_tail(self) -> str:
        """Return the last lines of the server's log."""
        return "\n".join(f"  [{self.name}] {line}" for line in self.log().splitlines()[-NUM_LAST_LINES:])

    def is_ready(self) -> bool:
        try:
            return self._http.get("/ready", timeout=2.0).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and its children, if it runs."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
