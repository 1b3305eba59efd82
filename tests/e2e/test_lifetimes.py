"""Processes that die are restarted, and leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from kvist.cluster.ports import free_ports
from kvist.testing.waits import wait_until
from tests.e2e.conftest import START_TIMEOUT_S

KVIST = (sys.executable, "-m", "kvist")
ASK = {
    "text": "The capital of France is",
    "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
}
EMBEDDED = ("--prefill=1", "--decode=1")
TINY = ("--prefill=0", "--decode=0", "--unified=1", "--load-format=dummy", "--model-path")


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def family_of(pid: int) -> list[int]:
    return [pid] + [one for child in children_of(pid) for one in family_of(child)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # ProcessLookupError if the process ends while its file is open
        return False


def test_two_workers_and_a_router_started_by_hand_answer_a_curl(
    tiny_model: Path, is_ready: Callable[[str], bool]
) -> None:
    prefill, decode, router = free_ports(3)
    model = str(tiny_model)
    flags = ("--model-path", model, "--host", "127.0.0.1", "--tp", "1", "--mem-fraction-static", "0.8")
    small = ("--load-format", "dummy", "--max-total-tokens", "8192")
    commands = [
        (*KVIST, "serve", *flags, *small, "--port", str(prefill)),
        (*KVIST, "serve", *flags, *small, "--port", str(decode), "--decode-only"),
        (
            *(*KVIST, "router", "--model-path", model, "--port", str(router)),
            *("--prefill", f"http://127.0.0.1:{prefill}", "--decode", f"http://127.0.0.1:{decode}"),
        ),
    ]
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in commands]
    families: list[int] = []
    try:
        url = f"http://127.0.0.1:{router}"
        wait_until(lambda: is_ready(url), within_s=START_TIMEOUT_S, what="the router is ready")
        families = [pid for process in started for pid in family_of(process.pid)]
        body = json.dumps({"prompt": "The capital of France is", "max_tokens": 16, "ignore_eos": True})
        if shutil.which("curl"):
            command = ["curl", "-sS", f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
            answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        else:
            answer = httpx.post(f"{url}/v1/completions", content=body, timeout=60).text
        assert json.loads(answer)["usage"]["completion_tokens"] == 16
    finally:
        for process in started:
            process.send_signal(signal.SIGINT)  # Ctrl-C
        codes = [process.wait(timeout=60) for process in started]
    assert codes == [0, 0, 0]
    wait_until(lambda: not any(map(is_alive, families)), within_s=60, what="every process has ended")


@pytest.mark.case("signal-to-all")
@pytest.mark.parametrize(
    ("number", "to_all", "code", "workers"),
    [(signal.SIGINT, False, 0, EMBEDDED), (signal.SIGTERM, True, 0, TINY), (signal.SIGKILL, False, -9, TINY)],
)
def test_kvist_up_leaves_nothing_behind_however_it_ends(
    number: signal.Signals,
    to_all: bool,
    code: int,
    workers: tuple[str, ...],
    tiny_model: Path,
    tmp_path: Path,
    memory_folder: Path,
) -> None:
    port = free_ports(1)[0]
    log = tmp_path / "up.log"
    model = [str(tiny_model)] if workers == TINY else []
    command = [*KVIST, "up", "--max-total-tokens=8192", f"--port={port}", *workers, *model]
    with log.open("wb") as stream:
        up = subprocess.Popen(
            command, stdout=stream, stderr=stream, env={**os.environ, "KVIST_RUNTIME_DIR": str(memory_folder)}
        )
    try:
        wait_until(
            lambda: "Ctrl-C stops everything" in log.read_text(), within_s=START_TIMEOUT_S, what="kvist up is ready"
        )
        family = family_of(up.pid)
        assert len(family) == (6 if workers == EMBEDDED else 4), (
            "kvist up, its router, and two processes of each worker"
        )
        answer = httpx.post(f"http://127.0.0.1:{port}/generate", json=ASK, timeout=60)
        assert answer.json()["meta_info"]["completion_tokens"] == 4
        assert workers == TINY or "Paris" in answer.json()["text"]
    finally:
        for pid in family if to_all else [up.pid]:  # as a service manager or a terminal does
            os.kill(pid, number)
        assert up.wait(timeout=60) == code, log.read_text()
    wait_until(lambda: not any(map(is_alive, family)), within_s=60, what="every process has ended")
    if code == 0:
        output = log.read_text()
        assert "Traceback" not in output
        assert "next start" not in output
    # the empty lock file of a dead epoch stays for some time, so that peers can distinguish "dead" from "unknown"
    assert [path for path in memory_folder.rglob("*") if path.is_file() and path.stat().st_size] == []
