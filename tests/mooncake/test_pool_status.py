"""The state of a pool is read from its master's metrics among any other lines, and kept at hand."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import Unavailable, WireError
from kvist.mooncake.master_admin import MasterAdmin
from kvist.mooncake.pool_watch import PoolWatch
from kvist.pool_status import StoreShare, WatchedPool, read_pool_status
from kvist.request import Role, WorkerId
from kvist.router.stream import ClusterSnapshot, WorkerSnapshot
from kvist.server.storage_names import named_status
from kvist.server.worker_metrics import pool_families
from kvist.testing.clocks import FakeClock
from kvist.testing.specs import make_load
from kvist.testing.waits import wait_until
from kvist.wire import Decoder, EngineToGateway, LoadReport, StorageStatus, encode

TEXT = """\
# HELP master_key_count Total number of keys
# TYPE master_key_count gauge
master_key_count 40
master_total_capacity_bytes 134217728
master_allocated_bytes 40000000
segment_allocated_bytes{segment="127.0.0.1:13133"} 26000000
segment_total_capacity_bytes{segment="127.0.0.1:13133"} 67108864
segment_total_capacity_bytes{segment="[::1]:13912"} 67108864
master_value_size_bytes_bucket{le="4096.000000"} 1
master_copy_end_requests_total 6
master_copy_end_failures_total 2
master_evicted_key_count 3
mem_cache_nums_ 38
file_cache_nums_ 40
master_active_clients 2
"""


def test_the_state_is_read_from_the_masters_metrics() -> None:
    status = read_pool_status(TEXT)
    assert (status.num_keys, status.num_keys_in_memory, status.num_keys_on_ssd, status.num_stores) == (40, 38, 40, 2)
    assert (status.capacity_bytes, status.used_bytes) == (134217728, 40000000)
    assert status.stores == {
        "127.0.0.1:13133": StoreShare(capacity_bytes=67108864, used_bytes=26000000),
        "[::1]:13912": StoreShare(capacity_bytes=67108864, used_bytes=0),
    }
    assert (status.num_hot_copies, status.num_evicted_keys, status.num_failed_allocations) == (4, 3, 0)


@given(st.lists(st.text(max_size=60) | st.from_regex(r"[a-z_]{1,20}(\{[^}]*\})? [0-9eE+.naif-]{1,20}"), max_size=20))
def test_other_lines_change_nothing(lines: list[str]) -> None:
    other = [line for line in lines if not line.strip().startswith(("master_", "segment_", "mem_", "file_", "total_"))]
    assert read_pool_status("\n".join([*other, TEXT, *other])) == read_pool_status(TEXT)


@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
def test_a_text_of_another_server_is_refused(text: str) -> None:
    with pytest.raises(WireError, match="master_key_count"):
        read_pool_status(text.replace("master_key_count", ""))


class _Master(ThreadingHTTPServer):
    """Answers every path with `answer`, or not at all."""

    def __init__(self) -> None:
        self.answer, self.status, self.goes_on = TEXT, 200, threading.Event()
        self.goes_on.set()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Master

    def do_GET(self) -> None:
        self.server.goes_on.wait(30)
        body = self.server.answer.encode()
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def master() -> Iterator[_Master]:
    server = _Master()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.goes_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_silent_or_foreign_master_is_an_error_within_the_timeout(master: _Master) -> None:
    admin = MasterAdmin(master.url, timeout_s=0.2)
    assert admin.pool_status().num_keys == 40
    master.answer = "<html>"
    with pytest.raises(WireError):
        admin.pool_status()
    with pytest.raises(WireError, match="does not answer as a Mooncake master does"):
        admin.segments()
    master.status = 401
    with pytest.raises(Unavailable, match="--api-key"):
        admin.segments()
    master.goes_on.clear()
    with pytest.raises(Unavailable, match="does not answer"):
        admin.segments()
    admin.close()


def test_the_watch_keeps_the_last_answer_and_its_age_and_never_waits(master: _Master) -> None:
    clock = FakeClock(100.0)
    watch = PoolWatch(master.url, interval_s=0.01, clock=clock)
    wait_until(lambda: watch.latest().status is not None)
    master.status = 500
    wait_until(lambda: bool(watch.latest().problem))
    clock.advance(7.0)
    latest = watch.latest()
    assert latest.status is not None
    assert (latest.status.num_keys, latest.age_s) == (40, 7.0)
    assert "500" in latest.problem
    watch.close()


def worker_with(pool: WatchedPool | None, name: str) -> WorkerSnapshot:
    storage = StorageStatus(
        backend="mooncake",
        options={},
        prefetch_policy="timeout",
        state="attached",
        breaker="closed",
        num_quarantined_pages=0,
        stored_bytes=0,
        errors={},
        location="mooncake:10.0.0.5:50051/default",
        pool=pool,
    )
    load = msgspec.structs.replace(make_load(), storage=storage)
    return WorkerSnapshot(worker_id=WorkerId(name), role=Role.UNIFIED, alive=True, spec=None, load=load)


def test_a_pool_is_shown_once_by_its_latest_answer() -> None:
    status = read_pool_status(TEXT)
    old = WatchedPool(master="http://m", status=msgspec.structs.replace(status, num_keys=7), age_s=30.0)
    new = WatchedPool(master="http://m", status=status, age_s=1.0, problem="no answer")
    none = WatchedPool(master="http://m", problem="never answered")
    workers = tuple(worker_with(pool, f"w{index}") for index, pool in enumerate((old, new, none, None)))
    shown = {
        (family.name.removeprefix("kvist:storage_pool_"), sample.labels["pool"]): sample.value
        for family in pool_families(ClusterSnapshot(workers=workers))
        for sample in family.samples
    }
    location = "mooncake:10.0.0.5:50051/default"
    assert shown["keys", location] == 40
    assert shown["capacity_bytes", location] == 134217728
    assert {pool for _, pool in shown} == {location}


def test_the_pool_is_part_of_the_state_of_the_storage_tier() -> None:
    pool = WatchedPool(master="http://m", status=read_pool_status(TEXT), age_s=1.0)
    load = worker_with(pool, "w").load
    assert load is not None
    sent = Decoder(EngineToGateway).decode(encode(load))
    assert isinstance(sent, LoadReport)
    assert sent.storage is not None
    assert sent.storage.pool == pool
    shown = json.loads(msgspec.json.encode(named_status(sent.storage)))
    assert shown["pool"]["status"]["num_keys"] == 40
