"""Real workers and two routers that start in any order, share work, and die in every way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from kvist.cluster.ports import free_ports
from kvist.testing.rounds import check_time, in_rounds
from kvist.testing.waits import wait_until
from tests.e2e.conftest import START_TIMEOUT_S
from tests.e2e.test_lifetimes import family_of, is_alive

KVIST = (sys.executable, "-m", "kvist")
KEY = "the key of the test, long enough"
WORKER = ("--load-format=dummy", "--num-threads=1", "--max-total-tokens=65536", "--gateway-timeout-s=3")
JOINS = ("--announce-interval-s", "0.5", "--router")


class Machines:
    """Processes started by hand, with a tiny model. Mutable; owned by one test."""

    def __init__(self, stack: ExitStack, folder: Path, runtime_dir: Path, model: Path) -> None:
        self._stack, self._model = stack, ("--model-path", str(model))
        self._environ = {**os.environ, "KVIST_CLUSTER_KEY": KEY, "KVIST_RUNTIME_DIR": str(runtime_dir)}
        self._log = (folder / "log").open("ab")
        stack.callback(self._log.close)

    def start(self, verb: str, *argv: str, url: str) -> subprocess.Popen[bytes]:
        command = (*KVIST, verb, *self._model, "--port", url.rpartition(":")[2], *argv)
        process = subprocess.Popen(command, env=self._environ, stdout=self._log, stderr=self._log)
        self._stack.callback(_kill, process)
        return process


def _kill(process: subprocess.Popen[bytes]) -> None:
    for pid in family_of(process.pid) if process.poll() is None else []:
        os.kill(pid, signal.SIGKILL)
    process.wait(60)


class Stream:
    """A long stream that a thread reads."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self.lines: list[str] = []
        self.error: httpx.HTTPError | None = None
        body = {"prompt": "1 2 3", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        self._thread = Thread(target=self._read, args=(url, body))
        self._thread.start()

    def _read(self, url: str, body: dict[str, object]) -> None:
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
                self.lines.extend(line for line in response.iter_lines() if line)
        except httpx.HTTPError as error:
            self.error = error

    def wait(self) -> list[str]:
        self._thread.join(120)
        assert not self._thread.is_alive()
        return self.lines


def workers_of(router: str) -> dict[str, dict[str, Any]]:
    try:
        return {worker["url"]: worker for worker in httpx.get(f"{router}/workers", timeout=5).json()["workers"]}
    except httpx.HTTPError:  # not started yet
        return {}


def is_healthy(router: str, worker: str) -> bool:
    return bool(workers_of(router).get(worker, {}).get("is_healthy"))


def all_healthy(router: str, urls: set[str]) -> bool:
    return {url for url, worker in workers_of(router).items() if worker["is_healthy"]} == urls


@pytest.fixture
def machines(tmp_path: Path, memory_folder: Path, tiny_model: Path) -> Iterator[Machines]:
    with ExitStack() as stack:
        yield Machines(stack, tmp_path, memory_folder, tiny_model)


def num_open(router: str) -> int:
    return sum(worker["load"] for worker in workers_of(router).values())


def num_running(router: str) -> float:
    """Return how many requests of all routers run at the workers, by their last reports."""
    lines = httpx.get(f"{router}/metrics", timeout=5).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("kvist:num_requests_running{"))


def test_workers_and_routers_start_in_any_order_and_die_in_every_way(machines: Machines) -> None:
    first, second, one, other = (f"http://127.0.0.1:{port}" for port in free_ports(4))

    def start_worker(url: str) -> subprocess.Popen[bytes]:
        return machines.start("serve", *WORKER, *JOINS, first, second, url=url)

    workers = {one: start_worker(one)}  # before its routers
    dying = machines.start("router", url=first)
    machines.start("router", url=second)
    workers[other] = start_worker(other)
    for router in (first, second):
        wait_until(
            partial(all_healthy, router, {one, other}), within_s=START_TIMEOUT_S, what=f"both workers at {router}"
        )
    the_requests_of_a_dead_router_are_aborted_and_those_of_the_other_go_on(first, second, dying)

    def leaves_in_time(worker: str, limit_s: float, why: str) -> None:
        left_s = wait_until(lambda: not is_healthy(second, worker))
        check_time(left_s < limit_s, f"out of the routing after {left_s:.2f} s: {why}")

    def family_of_the_worker(url: str) -> list[int]:
        if workers[url].poll() is not None:  # after a slow round
            workers[url] = start_worker(url)
        wait_until(lambda: is_healthy(second, url), within_s=START_TIMEOUT_S, what=f"{url} is ready")
        return family_of(workers[url].pid)

    @in_rounds(3)
    def a_suspended_worker_leaves() -> None:
        family = family_of_the_worker(other)
        for pid in family:
            os.kill(pid, signal.SIGSTOP)
        try:
            leaves_in_time(other, 3.0, "it is silent")
        finally:
            for pid in family:
                os.kill(pid, signal.SIGCONT)

    @in_rounds(3)
    def a_killed_worker_leaves() -> None:
        for pid in family_of_the_worker(other):
            os.kill(pid, signal.SIGKILL)
        workers[other].wait(60)
        leaves_in_time(other, 1.0, "its sockets are closed")

    @in_rounds(3)
    def a_stopped_worker_leaves() -> None:
        family = family_of_the_worker(one)
        workers[one].terminate()
        try:
            leaves_in_time(one, 2.0, "it withdraws")
        finally:
            assert workers[one].wait(60) == 0
        assert not any(map(is_alive, family))

    a_suspended_worker_leaves()
    a_killed_worker_leaves()
    wait_until(lambda: other not in workers_of(second), within_s=30, what="its announcements expire")
    a_stopped_worker_leaves()
    assert workers_of(second) == {}


def the_requests_of_a_dead_router_are_aborted_and_those_of_the_other_go_on(
    first: str, second: str, process_of_first: subprocess.Popen[bytes]
) -> None:
    lost, kept = [Stream(first, 30_000) for _ in range(2)], [Stream(second, 1000) for _ in range(4)]
    wait_until(lambda: num_open(second) == 4 and num_open(first) == 2, within_s=60, what="all streams run")
    process_of_first.kill()
    num_before = [len(stream.lines) for stream in kept]
    for stream in lost:
        stream.wait()
        assert stream.error is not None
    for stream, num_lines in zip(kept, num_before, strict=True):
        assert stream.wait()[-1] == "data: [DONE]"
        assert len(stream.lines) > num_lines + 200
    wait_until(lambda: num_running(second) == 0, within_s=30, what="the requests of the dead router are aborted")
