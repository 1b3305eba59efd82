"""Real processes that are suspended (SIGSTOP) under load are noticed, logged and restarted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

ASK = {"prompt": "1 2 3", "max_tokens": 4000, "stream": True, "ignore_eos": True}


def engine_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


class Stream:
    """A stream that a thread reads to its end or error."""

    def __init__(self, url: str) -> None:
        self.events: list[str] = []
        self._url = url
        self._thread = Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with httpx.stream("POST", f"{self._url}/v1/completions", json=ASK, timeout=120) as response:
            self.events.extend(line for line in response.iter_lines() if line)

    def wait(self) -> list[str]:
        self._thread.join(120)
        assert not self._thread.is_alive()
        return self.events


@pytest.mark.case("stopped-engine")
def test_a_suspended_engine_worker_and_router_are_noticed_and_restarted(
    settled: Any, is_ready: Callable[[str], bool]
) -> None:
    """Three at once: an engine, whose worker reports it; the HTTP process of another worker; and the router."""
    children = settled.processes.children
    pids = {name: children[name].pid for name in ("router", "decode-0", "unified")}
    restarts = {name: children[name].num_restarts for name in pids}
    engine = engine_of(pids["unified"])
    stream = Stream(settled.unified)
    settled.wait_until(lambda: bool(stream.events), within_s=60)  # an error before the first token is an HTTP status
    stopped_s = time.monotonic()
    for pid in (engine, pids["decode-0"], pids["router"]):
        os.kill(pid, signal.SIGSTOP)
    tokenless = Stream(settled.unified)
    settled.wait_until(lambda: not is_ready(settled.unified), within_s=60)
    noticed_s = time.monotonic() - stopped_s
    reason = httpx.get(f"{settled.unified}/ready", timeout=60).json()["error"]["message"]
    assert "no progress" in reason or "down" in reason, reason
    assert stream.wait()[-2] == "event: error", stream.events[-5:]
    assert '"code":"worker_lost"' in stream.events[-1]
    (error,) = tokenless.wait()
    assert '"code":"worker_lost"' in error
    assert time.monotonic() - stopped_s < noticed_s + 30, "the stream ended long after its engine was lost"
    settled.wait_until(lambda: not Path(f"/proc/{engine}").exists(), within_s=60)
    for name in ("router", "decode-0"):
        settled.wait_until(lambda name=name: children[name].num_restarts > restarts[name], within_s=60)
        assert any(line.startswith(f"[{name}] has not answered for") for line in settled.lines)
    assert children["unified"].num_restarts == restarts["unified"], "its HTTP was never stopped"
    settled.wait_ready()
    settled.wait_until(lambda: is_ready(settled.unified), within_s=60)
    answer = httpx.post(f"{settled.unified}/v1/completions", json={"prompt": "1 2", "max_tokens": 2}, timeout=60)
    assert answer.status_code == 200
