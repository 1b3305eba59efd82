"""The progress line of a scenario, and the results of an interrupted one."""

from __future__ import annotations

import io
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvist.bench import report as reports
from kvist.bench.progress import LINE_INTERVAL_S, LOG_INTERVAL_S, ProgressLine
from tests.bench.fake_server import FakeServer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_one_line_with_an_estimate_and_erases_it_at_the_end() -> None:
    terminal = Terminal()
    progress = ProgressLine("rate", 40, start_s=0.0, stream=terminal)
    progress.show(10, LINE_INTERVAL_S / 2)
    assert terminal.getvalue() == ""  # below the interval
    progress.show(10, 5.0)
    progress.close()
    assert "[#####...............] rate: 10 of 40 requests, 5 s so far, about 15 s left" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[2K")


def test_without_a_terminal_progress_is_logged_at_intervals(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    progress = ProgressLine("rate", 40, start_s=0.0, stream=stream)
    with caplog.at_level(logging.INFO, "kvist.bench"):
        for now_s in range(1, 26):
            progress.show(0, float(now_s))
    progress.close()
    assert [record.message for record in caplog.records] == [
        f"rate: 0 of 40 requests, {LOG_INTERVAL_S:.0f} s so far",
        f"rate: 0 of 40 requests, {2 * LOG_INTERVAL_S:.0f} s so far",
    ]
    assert stream.getvalue() == ""


def test_an_interrupted_benchmark_shows_and_writes_its_finished_requests(server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "kvist", "bench", "single", "--base-url", server.url, "--warmup=0"]
    command += ["--requests=5000", "--input-tokens=8", "--output-tokens=4", f"--json={file}"]

    def heed_sigint() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background of a shell inherits that it is ignored

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_sigint
    ) as process:
        deadline_s = time.monotonic() + 60
        while len(server.received) < 10 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted: the figures cover the" in shown
    (run,) = reports.decode(file.read_bytes()).runs
    assert 5 <= len(run.rows) < 5000
    assert all(row.failure is None for row in run.rows)
    assert run.warnings[0].startswith("interrupted")
