"""A `kvist serve` that a benchmark starts, asks by `kvist bench`, watches through its metrics, and stops or kills.

The server runs in a process group of its own with its output in a file, and ends when this process ends, however that
happens. Every wait has a limit; what goes wrong is a `Trouble` that ends with the server's last words.
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
from typing import Any

import httpx

from kvist.cluster.plan import free_ports

STOP_TIMEOUT_S = 30.0
REPORT_INTERVAL_S = 1.3  # workers report what they counted once a second
NUM_LAST_LINES = 20
KVIST = (sys.executable, "-m", "kvist")
Report = dict[str, Any]  # what `kvist bench --json` writes


class Trouble(Exception):
    """A row that cannot be measured, and why."""


class Served:
    """One life of a server. Use as a context manager: it is stopped at the end."""

    def __init__(self, name: str, flags: Sequence[str], logs: Path) -> None:
        self.name = name
        self.port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self.argv = (*KVIST, "serve", *flags, f"--port={self.port}", "--stop-with-stdin")
        self.ready_s = 0.0
        self._log_path = logs / f"{name.replace('+', '-').replace(' ', '-')}-{self.port}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process is not None:
                self._process.wait(STOP_TIMEOUT_S)
        self.kill()

    def start(self, timeout_s: float) -> None:
        """Returns when it is ready; `ready_s` says how long that took."""
        start_s = time.monotonic()
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.argv, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        while not self._is_ready():
            self.ready_s = time.monotonic() - start_s
            if self._process.poll() is not None:
                raise Trouble(f"{self.name}: the server ended with status {self._process.returncode}\n{self.said()}")
            if self.ready_s > timeout_s:
                raise Trouble(f"{self.name}: not ready after {timeout_s:g} s\n{self.said()}")
            time.sleep(0.05)
        self.ready_s = time.monotonic() - start_s

    def kill(self) -> None:
        """SIGKILL to it and its engine, as a crash of both."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait(STOP_TIMEOUT_S)
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process = None

    def metrics(self) -> dict[str, float]:
        """The worker's own counters, by their names without `kvist:worker_` and `_total`."""
        time.sleep(REPORT_INTERVAL_S)
        text = httpx.get(f"{self.url}/metrics", timeout=10.0, trust_env=False).raise_for_status().text
        found = re.findall(r"^kvist:worker_(\w+)_total\{[^}]*\} (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    def bench(self, argv: Sequence[str], json_path: Path, timeout_s: float) -> Report:
        """`kvist bench ARGV`: what it wrote. Failed requests are trouble."""
        command = (*KVIST, "bench", *argv, f"--base-url={self.url}", f"--json={json_path}")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise Trouble(f"{self.name}: kvist bench took longer than {timeout_s:g} s\n{self.said()}") from error
        if done.returncode:
            raise Trouble(f"{self.name}: {' '.join(command)}\n{done.stdout}\n{done.stderr}\n{self.said()}")
        report: Report = json.loads(json_path.read_bytes())
        return report

    def log(self) -> str:
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def said(self) -> str:
        """The end of its log."""
        return "\n".join(f"  [{self.name}] {line}" for line in self.log().splitlines()[-NUM_LAST_LINES:])

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=2.0, trust_env=False).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
