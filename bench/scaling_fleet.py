"""Starts a `kvist up` for bench_scaling.py, sends it loads by `kvist bench`, and counts the router's CPU time."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from served import KVIST, BenchFailure, BenchServer, Report


class BenchCluster(BenchServer):
    """A router and workers. Use as a context manager: leaving it stops them."""

    def __init__(self, name: str, flags: Sequence[str], logs: Path) -> None:
        super().__init__(name, flags, logs)
        self.argv = (*KVIST, "up", *flags, f"--port={self.port}", "--no-access-log", "--stop-with-stdin")

    def _is_ready(self) -> bool:
        return re.search(r"^kvist +\| ready at ", self.log(), re.MULTILINE) is not None

    def check_alive(self) -> None:
        """Raise `BenchFailure` if the cluster has ended."""
        if self._process is None or self._process.poll() is not None:
            raise BenchFailure(f"{self.name}: the cluster has ended\n{self.log_tail()}")

    def router_cpu_s(self) -> float:
        """Return the CPU time that the router has used, in seconds."""
        assert self._process is not None
        routers = [pid for pid in _children(self._process.pid) if b"\0router\0" in _read(pid, "cmdline")]
        return sum(_cpu_s(pid) for pid in routers)

    def measure(self, argv: Sequence[str], json_path: Path, timeout_s: float) -> Report:
        """Run `kvist bench ARGV` and return the report of its run, with `router_cpu_s`; requests may have failed.

        Raises `BenchFailure` if nothing was measured in time; the client's file may still have the finished part."""
        json_path.unlink(missing_ok=True)
        command = (*KVIST, "bench", *argv, f"--base-url={self.url}", f"--json={json_path}", "--log-level=warning")
        before_s = self.router_cpu_s()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise BenchFailure(f"kvist bench took longer than {timeout_s:.0f} s\n{self.log_tail()}") from error
        used_s = self.router_cpu_s() - before_s
        if not json_path.exists():
            self.check_alive()
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise BenchFailure(f"kvist bench {argv[0]} measured nothing: {' '.join(last)}\n{self.log_tail()}")
        report: Report = json.loads(json_path.read_bytes())
        run: Report = report["runs"][0]
        return {**run, "router_cpu_s": used_s, "shown": done.stdout}


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has ended
        return b""


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(word) for word in task.read_text().split()]
    return found + [grandchild for child in found for grandchild in _children(child)]


def _cpu_s(pid: int) -> float:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0
