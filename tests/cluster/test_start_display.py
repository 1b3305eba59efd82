"""The display of a start of several processes, on a terminal and elsewhere."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from rich.console import Console
from rich.live import Live

from kvist.cluster import start_display
from kvist.cluster.start_display import StartBlock, StartLines, describe, is_routine
from kvist.progress import REPORT_INTERVAL_S
from kvist.supervisor.child import NO_ANSWER, Answer, Child, ChildPlan, ChildState
from kvist.supervisor.probe import probe_child
from kvist.testing.clocks import FakeClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(start_display, "MonotonicClock", lambda: clock)
    return clock


def children(**doings: str) -> dict[str, Child]:
    made = {}
    for name, text in doings.items():
        made[name] = Child(ChildPlan(name=name, argv=(), url=""))
        made[name].state, made[name].doing = ChildState.STARTING, text
    return made


def test_without_a_terminal_each_ready_process_gets_a_line_and_the_rest_few(clock: FakeClock) -> None:
    started, shown = children(decode="loading weights 40%", router=""), list[str]()
    report = StartLines(started, shown.append)
    report()
    clock.advance(3.0)
    started["router"].state = ChildState.READY
    report()
    report()
    assert shown == ["router is ready after 3.0 s"]
    clock.advance(REPORT_INTERVAL_S)
    report()
    report()
    assert shown[1:] == ["after 13 s: decode starting: loading weights 40%"]


def test_a_terminal_shows_a_changing_line_per_process_and_important_lines_above(clock: FakeClock) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    started = children(decode="loading weights 40%", router="")
    routine = "decode     | 2026-11-29 17:00:00.000 INFO    kvist.worker: loading"
    warning = "decode     | 2026-11-29 17:00:00.000 WARNING kvist.worker: [red]little room"
    with Live(console=console, auto_refresh=False, transient=True) as live:
        block = StartBlock(started, live, show_all=False)
        clock.advance(2.0)
        block()
        block.pass_on(routine)
        block.pass_on(warning)
        StartBlock(started, live, show_all=True).pass_on("decode     | shown at debug")
    text = written.getvalue()
    assert "decode  starting: loading weights ████████░░░░░░░░░░░░ 40%" in text
    assert "router  starting" in text
    assert "        2 s" in text
    assert routine not in text
    assert warning in text, "a client's text is no markup"
    assert "shown at debug" in text


@pytest.mark.parametrize(
    ("line", "routine"),
    [
        ("2026-11-29 17:00:00.000 INFO    kvist.worker: loading", True),
        ('{"time": "2026-11-29T17:00:00.000+00:00", "level": "info", "logger": "kvist"}', True),
        ("2026-11-29 17:00:00.000 ERROR   kvist.worker: lost", False),
        ('{"time": "2026-11-29T17:00:00.000+00:00", "level": "warning", "logger": "kvist"}', False),
        ("    Traceback (most recent call last):", False),
        ("was killed by signal 9; the next start is in 0.5 s", False),
    ],
)
def test_routine_log_lines_are_recognized_in_both_log_formats(line: str, routine: bool) -> None:
    assert is_routine(line) is routine


def test_a_long_progress_text_is_cut_to_one_line() -> None:
    assert len(describe(children(a="x" * 500)["a"])) < 80


class _Starting(BaseHTTPRequestHandler):
    bodies = {  # noqa: RUF012
        "/loading/ready": b'{"error":{"message":"not ready: loading weights 40%"}}',
        "/waiting/ready": b'{"error":{"message":"not ready (a:1: no answer)"}}',
        "/other/ready": b"<html>",
    }

    def do_GET(self) -> None:
        body = self.bodies[self.path]
        self.send_response(503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Starting)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_starting_child_is_alive_and_its_progress_is_read(url: str) -> None:
    assert probe_child(f"{url}/loading", "id") == Answer(alive=True, doing="loading weights 40%")
    assert probe_child(f"{url}/waiting", "id") == Answer(alive=True)
    assert probe_child(f"{url}/other", "id") == NO_ANSWER


def test_a_probe_is_cheap(url: str) -> None:
    num_probes = 20
    before_s = time.thread_time()
    for _ in range(num_probes):
        probe_child(f"{url}/loading", "id")
    assert time.thread_time() - before_s < num_probes * 0.004, "nine children are probed four times a second each"
