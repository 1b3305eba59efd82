"""The log lines and the announcement of a server during its start."""

from __future__ import annotations

import asyncio
import logging
import shlex
import subprocess
from pathlib import Path

import pytest

from kvist.cluster import announce as module
from kvist.cluster.announce import announce, curl_example, router_example, shown_key, waiting_for
from kvist.request import Role, WorkerId
from kvist.router.stream import ClusterSnapshot, WorkerSnapshot


def worker(name: str, *, alive: bool = False, problem: str = "") -> WorkerSnapshot:
    return WorkerSnapshot(
        worker_id=WorkerId(name), role=Role.UNIFIED, alive=alive, spec=None, load=None, state="lost", problem=problem
    )


class Script:
    """Readiness at each check, by a list; the last entry repeats."""

    def __init__(self, *looks: bool) -> None:
        self._looks = list(looks)
        self.num_looks = 0

    def ready(self) -> bool:
        self.num_looks += 1
        return self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]

    def snapshot(self) -> ClusterSnapshot:
        return ClusterSnapshot(workers=(worker("a:1", problem="still loading"), worker("b:2", alive=True)))


async def watch(script: Script, num_looks: int) -> int:
    """Return the number of announcements."""
    num_announced = 0

    def say() -> None:
        nonlocal num_announced
        num_announced += 1

    task = asyncio.create_task(announce(script, say))
    while script.num_looks < num_looks:
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return num_announced


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_INTERVAL_S", 0.001)
    monkeypatch.setattr(module, "REPORT_INTERVAL_S", 0.0)


async def test_readiness_is_announced_once_and_its_loss_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kvist.cluster.announce"):
        assert await watch(Script(False, False, True, False, True), 6) == 1
    assert [record.message for record in caplog.records] == [
        "waiting for a:1 (still loading)",  # only once, although the state is the same at the second check
        "no longer ready: a:1 (still loading)",
        "ready again",
    ]


def test_a_router_names_a_limited_number_of_missing_workers() -> None:
    snapshot = ClusterSnapshot(workers=tuple(worker(f"w:{port}", problem="no answer") for port in range(100)))
    text = waiting_for(snapshot)
    assert text.startswith("w:0 (no answer); w:1 (no answer)")
    assert text.endswith("92 more")
    assert waiting_for(ClusterSnapshot(workers=(worker("a:1", alive=True),))) == "a worker of the other role"
    assert "kvist serve --router" in waiting_for(ClusterSnapshot(workers=()))


def test_the_curl_example_is_a_valid_shell_command() -> None:
    words = shlex.split(curl_example("http://h:1", api_key="s3cret"))
    assert words[:2] == ["curl", "http://h:1/v1/chat/completions"]
    assert "Authorization: Bearer s3cret" in words
    assert "Authorization" not in curl_example("http://h:1")


def test_the_shell_of_the_curl_example_reads_the_key_from_its_file(tmp_path: Path) -> None:
    key = tmp_path / "api-key"
    key.write_text("s3cret", encoding="ascii")
    shown = curl_example("http://h:1", key_file=key).replace("curl ", "printf '%s\\n' ", 1)
    words = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "Authorization: Bearer s3cret" in words
    assert words[0] == "http://h:1/v1/chat/completions"
    assert router_example("http://h:1", Role.DECODE) == "kvist router --prefill PREFILL_URL --decode http://h:1"


def test_an_api_key_is_printed_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_key([]) is None
    assert shown_key(["s3cret"]) == "YOUR_KEY"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert shown_key(["s3cret", "other"]) == "s3cret"
