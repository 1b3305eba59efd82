"""Faults that are not deaths of workers: networks, stores, gateways, and engines that hang. Each has a bound.

One cluster of a tiny model: a gateway and two unified workers, one of which ("far") the gateway reaches only through
relays (kvist.testing.tcp_relay), both its HTTP server and its engine. Streams alternate between the two.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from chaos_load import Case, StreamReader, difference, read_answer
from kvist.clock import MonotonicClock
from kvist.cluster.ports import free_ports
from kvist.cluster.processes import ChildTimeouts, Processes
from kvist.http_client import HttpClient, HttpFailure
from kvist.supervisor.child import ChildPlan
from kvist.supervisor.probe import probe_child
from kvist.testing.rounds import check_time, in_rounds
from kvist.testing.tcp_relay import Link, TcpRelay
from kvist.testing.waits import wait_until
from tests.e2e.conftest import START_TIMEOUT_S, metric_of
from tests.e2e.test_lifetimes import children_of
from tests.e2e.test_membership import workers_of

FAR_HOST = "127.0.0.2"  # of the relays
NUM_STREAMS = 4
NUM_TOKENS = 300  # enough for a fault in the midst
GATEWAY_TIMEOUT_S = 3.0
BUSY_S = 1.5  # more than each bound, for a busy machine
KVIST = (sys.executable, "-m", "kvist")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """The cluster."""

    processes: Processes
    relays: tuple[TcpRelay, TcpRelay]
    gateway: str  # URL
    near: str
    far: str  # as the gateway reaches it
    far_directly: str
    store: Path
    lines: list[str]

    def link(self, link: Link, *, delay_s: float = 0.0) -> None:
        for relay in self.relays:
            relay.set(link, delay_s=delay_s)

    def is_healthy(self, url: str) -> bool:
        return bool(workers_of(self.gateway).get(url, {}).get("is_healthy"))

    def wait_ready(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not (self.is_healthy(self.near) and self.is_healthy(self.far)):
            assert time.monotonic() < deadline_s, "\n".join(self.lines[-40:])
            time.sleep(0.05)

    def restore(self) -> None:
        """Open the links, and wait until both workers serve."""
        self.link(Link.OPEN)
        self.wait_ready()

    def failovers(self) -> float:
        return metric_of(self.gateway, "kvist:failovers_total")

    def held(self) -> float:
        """Return the requests and pages that either worker holds, by its own reports."""
        states = ("owned", "in_flight")
        return sum(
            metric_of(url, "kvist:num_requests_running")
            + sum(metric_of(url, "kvist:kv_pages", state=state) for state in states)
            for url in (self.near, self.far_directly)
        )


@pytest.fixture(scope="module")
def started(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    model, store = str(tiny_model), tmp_path_factory.mktemp("faults") / "store"
    gateway, near, far, engine = free_ports(4)
    serve = (
        *(*KVIST, "serve", "--model-path", model, "--load-format=dummy", "--num-threads=1", "--max-total-tokens=16384"),
        *("--enable-hierarchical-cache", "--hicache-storage-backend=file", f"--hicache-storage-path={store}"),
        *(
            "--hicache-storage-size=1",
            "--hicache-storage-read-processes=1",
            f"--gateway-timeout-s={GATEWAY_TIMEOUT_S}",
            "--stop-with-stdin",
        ),
    )
    far_flags = (f"--port={far}", f"--engine-port={engine}", f"--engine-advertise-host={FAR_HOST}")
    urls = (f"http://127.0.0.1:{near}", f"http://{FAR_HOST}:{far}")
    router = (*KVIST, "router", "--model-path", model, "--policy=round_robin", "--stop-with-stdin")
    plans = [
        ChildPlan(name="near", argv=(*serve, f"--port={near}"), url=urls[0]),
        ChildPlan(name="far", argv=(*serve, *far_flags), url=f"http://127.0.0.1:{far}"),
        ChildPlan(
            name="router",
            argv=(*router, f"--port={gateway}", "--worker-urls", *urls),
            url=f"http://127.0.0.1:{gateway}",
        ),
    ]
    lines: list[str] = []
    with ExitStack() as stack:
        relays = [
            stack.enter_context(TcpRelay(listen=(FAR_HOST, port), target=("127.0.0.1", port))) for port in (far, engine)
        ]
        processes = stack.enter_context(
            Processes(
                plans,
                probe=probe_child,
                sink=lambda name, line: lines.append(f"[{name}] {line}"),
                timeouts=ChildTimeouts(stall_restart_s=60.0),
            )
        )
        processes.wait_ready(START_TIMEOUT_S)
        made = Pair(
            processes=processes,
            relays=(relays[0], relays[1]),
            gateway=f"http://127.0.0.1:{gateway}",
            near=urls[0],
            far=urls[1],
            far_directly=f"http://127.0.0.1:{far}",
            store=store,
            lines=lines,
        )
        made.wait_ready()
        yield made


@pytest.fixture
def pair(started: Pair) -> Iterator[Pair]:
    started.wait_ready()
    yield started
    started.restore()
    assert wait_until(lambda: started.held() == 0) < GATEWAY_TIMEOUT_S + 10


def make_cases(num_tokens: int) -> list[Case]:
    common = {"max_tokens": num_tokens, "ignore_eos": True, "stream": True, "return_token_ids": True}
    usage = {"stream_options": {"include_usage": True}, "kvist": {"report": True}}
    shapes: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 0.8, "seed": 6, "frequency_penalty": 0.4},
        {"temperature": 0, "logprobs": 1},
    ]
    return [
        Case(name=f"case {number}", body={"prompt": f"{number} streams", **common, **usage, **shape})
        for number, shape in enumerate(shapes)
    ]


CASES = make_cases(NUM_TOKENS)


@pytest.fixture(scope="module")
def twins(started: Pair) -> list[StreamReader]:
    """The undisturbed streams of the near worker."""
    readers = [StreamReader() for _ in CASES]
    asyncio.run(_read_all(started.near, CASES, readers))
    assert all(reader.answer.is_whole for reader in readers)
    return readers


async def _read_all(url: str, cases: list[Case], readers: list[StreamReader]) -> list[object]:
    client = HttpClient(url, api_key=None)
    try:
        async with asyncio.timeout(120):
            reads = [
                read_answer(client, case, reader, MonotonicClock()) for case, reader in zip(cases, readers, strict=True)
            ]
            return await asyncio.gather(*reads, return_exceptions=True)
    finally:
        client.close()


def stream_through(
    pair: Pair, fault: Callable[[], None], cases: list[Case] = CASES
) -> tuple[list[StreamReader], list[object]]:
    """Begin all streams, call `fault` in a thread once every stream has its first tokens, and return the streams and
    their statuses or errors. Raises `SlowRound` if a stream ended before its fault."""
    readers = [StreamReader() for _ in cases]

    async def run() -> list[object]:
        reading = asyncio.create_task(_read_all(pair.gateway, cases, readers))
        while not all(len(reader.event_times_s) > 5 for reader in readers):
            assert not reading.done(), "the streams ended before they had five events"
            await asyncio.sleep(0.005)
        is_early = not any(reader.answer.is_whole for reader in readers)
        await asyncio.to_thread(fault)
        ends = await reading
        check_time(is_early, "a stream ended before its fault")
        return ends

    return readers, asyncio.run(run())


def assert_equal(readers: list[StreamReader], twins: list[StreamReader]) -> None:
    for case, reader, twin in zip(CASES, readers, twins, strict=True):
        assert not reader.answer.error
        assert reader.answer.is_whole
        assert difference(twin.answer, reader.answer, case.comparison) is None


def longest_pause_s(readers: list[StreamReader]) -> float:
    return max(later - sooner for reader in readers for sooner, later in pairwise(reader.event_times_s))


def check_pauses(readers: list[StreamReader], noticed_s: float) -> None:
    pause_s = longest_pause_s(readers)
    check_time(pause_s < noticed_s + BUSY_S, f"a pause of {pause_s:.1f} s in a stream")


def check_moved(readers: list[StreamReader]) -> None:
    """Check that the far worker's streams went on elsewhere. They may have ended before the fault had its effect."""
    check_time(num_failovers(readers) >= NUM_STREAMS // 2, f"{num_failovers(readers)} failovers")


def num_failovers(readers: list[StreamReader]) -> int:
    return sum(reader.answer.num_failovers for reader in readers)


@pytest.mark.parametrize(("link", "noticed_s"), [(Link.CUT, 1.0), (Link.BLACK_HOLE, 3.0)])
@in_rounds(3)
def test_streams_of_a_worker_behind_a_broken_network_go_on_elsewhere(
    pair: Pair, twins: list[StreamReader], link: Link, noticed_s: float
) -> None:
    """A closed connection is noticed within a second, silence within three."""
    seen_s: list[float] = []
    pair.restore()

    def break_link() -> None:
        pair.link(link)
        seen_s.append(wait_until(lambda: not pair.is_healthy(pair.far)))

    readers, _ = stream_through(pair, break_link)
    assert_equal(readers, twins)
    check_moved(readers)
    check_time(seen_s[0] < noticed_s + BUSY_S, f"noticed after {seen_s[0]:.1f} s")
    check_pauses(readers, noticed_s)


@in_rounds(3)
def test_a_slow_network_delays_streams_and_moves_none(pair: Pair, twins: list[StreamReader]) -> None:
    pair.restore()
    before = pair.failovers()
    readers, _ = stream_through(pair, lambda: pair.link(Link.OPEN, delay_s=0.2))
    assert_equal(readers, twins)
    assert pair.failovers() == before
    assert num_failovers(readers) == 0


@in_rounds(3)
def test_streams_go_on_while_their_store_is_gone(pair: Pair, twins: list[StreamReader]) -> None:
    """A file takes the place of the store's folder; later the folder is back."""

    def remove() -> None:
        for _ in range(100):  # a worker that stores a page at this moment makes the folder again
            shutil.rmtree(pair.store, ignore_errors=True)
            with contextlib.suppress(IsADirectoryError):
                pair.store.write_text("no folder")
                return
        pytest.fail("the folder is made again and again")

    pair.store.mkdir(exist_ok=True)  # after a slow round
    before = pair.failovers()
    try:
        readers, _ = stream_through(pair, remove)
        assert_equal(readers, twins)
        readers, _ = stream_through(pair, lambda: None)
        assert_equal(readers, twins)
    finally:
        pair.store.unlink()
    assert pair.failovers() == before


@in_rounds(3)
def test_streams_of_an_engine_without_progress_go_on_elsewhere(pair: Pair, twins: list[StreamReader]) -> None:
    """The worker's HTTP server answers, and says that its engine is suspended."""
    pair.restore()
    child = pair.processes.children["far"]
    assert child.pid is not None
    (engine,) = children_of(child.pid)
    problems: list[str] = []
    noticed_s: list[float] = []  # by the gateway, and by the worker

    def is_unready() -> bool:
        response = httpx.get(f"{pair.far_directly}/ready", timeout=10)
        problems.append(response.text)
        return response.status_code == httpx.codes.SERVICE_UNAVAILABLE

    def suspend() -> None:
        os.kill(engine, signal.SIGSTOP)
        noticed_s.append(wait_until(lambda: not pair.is_healthy(pair.far)))
        noticed_s.append(noticed_s[0] + wait_until(is_unready))

    try:
        readers, _ = stream_through(pair, suspend)
    finally:
        os.kill(engine, signal.SIGCONT)
    assert_equal(readers, twins)
    check_moved(readers)
    assert "no progress" in problems[-1] or "down" in problems[-1]
    check_pauses(readers, 3.0)
    check_time(max(noticed_s) < 3.0 + BUSY_S, f"noticed after {max(noticed_s):.1f} s")


@in_rounds(3)
def test_a_worker_restarted_at_its_address_is_another_one(pair: Pair, twins: list[StreamReader]) -> None:
    """Its streams go on, the gateway forgets the old epoch, and the new process serves under the new one."""
    pair.restore()
    child = pair.processes.children["far"]
    epoch = workers_of(pair.gateway)[pair.far]["epoch"]
    readers, _ = stream_through(pair, lambda: child.signal_group(signal.SIGKILL))
    assert_equal(readers, twins)
    check_moved(readers)
    check_pauses(readers, 1.0)
    pair.wait_ready()
    assert workers_of(pair.gateway)[pair.far]["epoch"] != epoch
    readers, _ = stream_through(pair, lambda: None)
    assert_equal(readers, twins)


@in_rounds(3)
def test_streams_outlive_a_suspension_of_their_gateway_that_is_longer_than_its_timeout(
    pair: Pair, twins: list[StreamReader]
) -> None:
    """A worker aborts the requests of the silent gateway, which lets them go on once it is awake."""
    pair.restore()
    router = pair.processes.children["router"]

    def suspend() -> None:
        router.signal_group(signal.SIGSTOP)
        time.sleep(GATEWAY_TIMEOUT_S + 1.0)
        router.signal_group(signal.SIGCONT)

    readers, _ = stream_through(pair, suspend, make_cases(num_tokens=3000)[:1])
    for reader, twin in zip(readers, twins[:1], strict=True):
        assert reader.answer.is_whole, reader.answer.error
        (found, right) = (each.answer.choices[0].token_ids for each in (reader, twin))
        assert len(found) == 3000
        assert found[:NUM_TOKENS] == right


@in_rounds(3)
def test_streams_of_a_killed_gateway_end_and_its_workers_release_everything(
    pair: Pair, twins: list[StreamReader]
) -> None:
    def num_aborted() -> float:
        return sum(metric_of(url, "kvist:worker_requests_aborted_total") for url in (pair.near, pair.far_directly))

    pair.restore()
    before, released_s = num_aborted(), []

    def kill() -> None:
        pair.processes.children["router"].signal_group(signal.SIGKILL)
        released_s.append(wait_until(lambda: num_aborted() == before + NUM_STREAMS and pair.held() == 0))

    readers, ends = stream_through(pair, kill, make_cases(num_tokens=3900))  # longer than that takes
    assert all(isinstance(end, HttpFailure) for end in ends), ends
    for reader, twin in zip(readers, twins, strict=True):
        assert not reader.answer.is_whole
        (found, right) = (each.answer.choices[0].token_ids for each in (reader, twin))
        assert found[:NUM_TOKENS] == right[: len(found)]
    check_time(
        released_s[0] < 2.0 + BUSY_S,
        f"released after {released_s[0]:.1f} s: the connection is closed; a report of a worker takes a second",
    )
