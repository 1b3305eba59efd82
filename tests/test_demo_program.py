"""The program at the end of the demo."""

from __future__ import annotations

import pytest

import kvist.lang as kv
from kvist import demo_program
from kvist.execution.fake_server import FakeServer


def test_the_demo_shows_verdicts_a_title_and_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()
    monkeypatch.setattr(kv, "RuntimeEndpoint", lambda _url: kv.Endpoint(lambda: server, name="fake"))
    lines: list[str] = []
    demo_program.run_demo_program("http://127.0.0.1:1", lines.append)
    shown = "\n".join(lines)
    assert lines[0].startswith("A program of kvist.lang judged a text (clear: ")
    assert shown.count("Score verdict (2 choices)") == 3
    assert "demo_program.py:" in shown
    assert "took ms" in shown
    assert len(server.seen.scored) == 3
    assert not server.leases
