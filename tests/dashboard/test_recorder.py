"""The figures in a snapshot of a fleet that works evenly."""

from __future__ import annotations

import msgspec
import pytest

from kvist.dashboard.recorder import LINES, MAX_POINTS, Reading, Recorder
from kvist.dashboard.snapshot import Server, Snapshot, Worker
from kvist.metrics import GatewayMetrics
from kvist.router.stream import ClusterSnapshot
from tests.dashboard.fleet import busy_fleet

SERVER = Server(
    version="1",
    model="m",
    instance_id=None,
    role="router",
    ready=True,
    draining=False,
    num_open_requests=0,
    policy="cost",
)


class Run:
    """A recorder, and the gateway that it records."""

    def __init__(self) -> None:
        self.metrics = GatewayMetrics()
        self.recorder = Recorder(self.metrics)
        self.second = 0

    def step(self, cluster: ClusterSnapshot | None = None) -> Reading:
        """Serve for one second: ten requests of 100 prompt tokens, of which 60 are cached, and 25 output tokens."""
        metrics = self.metrics
        metrics.num_finished["stop"] += 10
        metrics.num_prompt_tokens += 1000
        metrics.num_cached_by_tier.update({"device": 400, "host": 150, "storage": 50})
        metrics.num_generation_tokens += 250
        for _ in range(10):
            metrics.time_to_first_token_s.observe(0.03)
        metrics.inter_token_latency_s.observe(0.004)
        self.second += 1
        now_s = float(self.second)
        found = busy_fleet(self.second, now_s) if cluster is None else cluster
        reading = Reading(now_s=now_s, unix_s=1e9 + now_s, server=SERVER, cluster=found, metrics=metrics)
        self.recorder.record(reading)
        return reading


@pytest.fixture(scope="module")
def after_a_while() -> Snapshot:
    run = Run()
    for _ in range(80):
        reading = run.step()
    return run.recorder.snapshot(reading, MAX_POINTS)


def by_id(snapshot: Snapshot, worker_id: str) -> Worker:
    return next(worker for worker in snapshot.workers if worker.worker_id == worker_id)


def test_the_traffic_of_the_gateway_has_the_rates_of_its_counters(after_a_while: Snapshot) -> None:
    traffic = after_a_while.traffic
    assert traffic.finished_per_s == pytest.approx(10)
    assert traffic.output_tokens_per_s == pytest.approx(250)
    tokens = traffic.prompt_tokens_per_s
    assert (tokens.device, tokens.host, tokens.storage, tokens.computed) == pytest.approx((400, 150, 50, 400))
    assert traffic.ttft_s.p50 is not None
    assert 0.025 < traffic.ttft_s.p50 < 0.05
    assert traffic.e2e_s.p50 is None


def test_each_worker_has_its_rates_pages_and_hits(after_a_while: Snapshot) -> None:
    prefill, decode = by_id(after_a_while, "10.0.0.1:30001"), by_id(after_a_while, "10.0.0.3:30002")
    assert prefill.computed_tokens_per_s == pytest.approx(2100)
    assert prefill.busy_share == pytest.approx(0.62)
    assert prefill.handoffs.sent_per_s == pytest.approx(9)
    assert prefill.handoffs.mean_s == pytest.approx(0.031)
    assert prefill.hit_rate.cached == pytest.approx(0.65)
    assert prefill.hit_rate.ceiling == pytest.approx(0.75)
    assert prefill.pages is not None
    assert prefill.host_pages is not None
    assert (prefill.pages.used, prefill.pages.total, prefill.host_pages.cached) == (596, 4096, 6100)
    assert decode.output_tokens_per_s == pytest.approx(840)
    assert decode.host_pages is None
    assert decode.hit_rate.cached is None


def test_a_lost_worker_is_shown_with_its_problem_and_without_figures(after_a_while: Snapshot) -> None:
    lost = by_id(after_a_while, "10.0.0.5:30002")
    assert (lost.state, lost.problem, lost.num_running, lost.pages) == ("lost", "silent for 5.0 s", None, None)


def test_handoffs_of_the_fleet_count_each_handoff_once(after_a_while: Snapshot) -> None:
    handoffs = after_a_while.handoffs
    assert handoffs.received_per_s == pytest.approx(9 * 1.8)
    assert handoffs.bytes_per_s == pytest.approx(1.8 * 420 * (2 << 20))
    assert handoffs.mean_s == pytest.approx(0.031)


def test_a_pool_is_shown_once_for_all_its_users(after_a_while: Snapshot) -> None:
    (pool,) = after_a_while.pools
    assert (pool.num_stores, pool.used_bytes, pool.num_pages) == (3, 41 << 30, 128_000)
    assert pool.stores["10.0.0.5:7001"] == (14 << 30, 32 << 30)


def test_decisions_say_what_the_router_knew_the_newest_first(after_a_while: Snapshot) -> None:
    routing = after_a_while.routing
    assert routing.reasons["held"] == 86
    newest = routing.decisions[0]
    assert newest.request_id == "chatcmpl-0015"
    assert newest.reason == "held"
    assert newest.time_unix_s == pytest.approx(after_a_while.time_unix_s - 0.7)
    assert [(each.worker_id, each.chosen) for each in newest.candidates] == [
        ("10.0.0.4:30002", True),
        ("10.0.0.9:30001", False),
    ]
    assert (newest.candidates[0].num_device_tokens, newest.candidates[0].num_host_tokens) == (56 * 16, 128)


def test_charts_have_every_line_and_a_bounded_number_of_points() -> None:
    run = Run()
    for _ in range(MAX_POINTS + 20):
        reading = run.step()
    series = run.recorder.snapshot(reading, MAX_POINTS).series
    assert set(series.lines) == set(LINES)
    assert len(series.times_unix_s) == MAX_POINTS
    assert {len(line) for line in series.lines.values()} == {MAX_POINTS}
    assert series.lines["hit_rate"][-1] == pytest.approx(0.65)
    assert series.lines["ttft_p99_s"][-1] == pytest.approx(0.05, rel=0.01)


def test_nothing_is_kept_of_workers_that_left() -> None:
    run = Run()
    run.step()
    reading = run.step(ClusterSnapshot(workers=()))
    assert run.recorder._workers == {}
    found = run.recorder.snapshot(reading, 1)
    assert found.workers == []
    assert found.hit_rate.cached is None


def test_a_snapshot_is_json(after_a_while: Snapshot) -> None:
    assert msgspec.json.decode(msgspec.json.encode(after_a_while), type=Snapshot) == after_a_while
