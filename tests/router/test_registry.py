"""The registry: state, cached pages and load of the workers."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.errors import ConfigError
from kvist.fairness import CallerPath
from kvist.page_index.page_feed import NUM_PIECES
from kvist.page_index.page_runs import NOTHING_HELD
from kvist.protocol import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION
from kvist.request import EpochId, RequestId, Role, WorkerId
from kvist.router.config import RouterConfig
from kvist.router.registry import Registry, Worker, WorkerState
from kvist.testing.page_events import joined, tier_changes
from kvist.testing.specs import make_load, make_roomy_spec
from kvist.wire import (
    ListPages,
    PageEvents,
    StorageStatus,
    StoreHints,
    Welcome,
)

A, B, C = (bytes([i]) * 16 for i in range(3))


def add(registry: Registry, name: str = "http://a", use: Role | None = None) -> Worker:
    return registry.add(name, use, 0.0)


def welcome(registry: Registry, worker: Worker, **spec: Any) -> None:
    fields = {"worker_id": WorkerId(worker.url), "epoch": EpochId(f"epoch of {worker.url}"), **spec}
    registry.on_welcome(worker, Welcome(spec=make_roomy_spec(**fields)), 1.0)


def test_a_worker_joins_is_ready_is_lost_and_comes_back() -> None:
    registry = Registry(RouterConfig())
    worker = add(registry)
    assert worker.state is WorkerState.JOINING
    assert registry.ready(Role.UNIFIED) == []
    welcome(registry, worker)
    assert registry.ready(Role.UNIFIED) == [worker]
    registry.on_lost(worker, "gone")
    assert (worker.state, worker.problem) == (WorkerState.LOST, "gone")
    assert registry.ready(Role.UNIFIED) == []
    welcome(registry, worker, epoch=EpochId("second"))
    assert (worker.state, worker.problem) == (WorkerState.READY, "")


def test_the_pages_of_a_lost_worker_are_forgotten() -> None:
    registry = Registry(RouterConfig())
    worker = add(registry)
    welcome(registry, worker)
    events = PageEvents(sequence=0, changes=(tier_changes(A, B),))
    assert registry.on_page_events(worker, events, 1.0) == ListPages(num_pieces=NUM_PIECES)
    assert registry.index.match([joined(A)]) == {worker.worker_id: (1, 0, 0)}
    registry.on_lost(worker, "gone")
    assert worker.pages is None
    assert registry.index.match([joined(A)]) == {}
    welcome(registry, worker, epoch=EpochId("second"))
    assert registry.index.match([joined(A)]) == {}


def test_a_page_that_one_worker_stored_is_known_for_every_worker_of_its_store() -> None:
    registry = Registry(RouterConfig())
    workers = [add(registry, f"http://{name}") for name in "abc"]
    for worker, location in zip(workers, ("file:/pages", "file:/pages", ""), strict=True):
        welcome(registry, worker)
        registry.on_report(worker, make_load(storage=storage_status(location)), 1.0)
    one, other, without = workers
    registry.on_page_events(one, PageEvents(sequence=0, store=StoreHints(found=joined(A, B))), 1.0)
    assert registry.index.match([joined(A, B, C)]) == {one.worker_id: (0, 0, 2), other.worker_id: (0, 0, 2)}
    registry.on_page_events(other, PageEvents(sequence=0, store=StoreHints(missing=joined(B))), 1.0)
    assert registry.index.match([joined(A, B, C)]) == {one.worker_id: (0, 0, 1), other.worker_id: (0, 0, 1)}
    registry.on_report(one, make_load(storage=storage_status("")), 1.0)
    assert registry.index.match([joined(A)]) == {other.worker_id: (0, 0, 1)}
    assert without.num_rejected_messages == 0
    registry.on_page_events(other, PageEvents(sequence=1, store=StoreHints(found=b"short")), 1.0)
    assert other.num_rejected_messages == 1


def storage_status(location: str) -> StorageStatus:
    return StorageStatus(
        backend="file" if location else None,
        options={},
        prefetch_policy="timeout",
        state="attached" if location else "detached",
        breaker="closed",
        num_quarantined_pages=0,
        stored_bytes=0,
        errors={},
        location=location,
    )


def test_pages_beyond_the_specs_of_a_worker_are_ignored_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(RouterConfig())
    worker = add(registry)
    welcome(registry, worker, num_pages=2, num_host_pages=1)
    assert worker.pages is not None
    worker.pages.request(1.0)
    registry.on_page_events(worker, PageEvents(sequence=0, changes=(tier_changes(A, B, C),)), 1.0)
    registry.on_page_events(worker, PageEvents(sequence=1, changes=(tier_changes(A, B, tier="host"),)), 1.0)
    assert (worker.pages.num_pages, worker.pages.num_cut) == (3, 2)
    assert caplog.text.count("--max-known-pages") == 1


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("model_fingerprint", "x", "model"),
        ("vocab_size", 5, "model"),
        ("dtype", "bf16", "dtype"),
        ("page_size", 32, "page"),
    ],
)
def test_a_worker_that_does_not_match_is_refused_and_listed_with_the_reason(
    field: str, value: object, word: str
) -> None:
    registry = Registry(RouterConfig())
    first, second = add(registry, "http://a"), add(registry, "http://b")
    welcome(registry, first)
    with pytest.raises(ConfigError, match=f"another {word}"):
        welcome(registry, second, **{field: value})
    assert registry.ready(Role.UNIFIED) == [first]
    assert "http://a" in registry.snapshot()[1].problem


def test_a_worker_with_another_model_may_join_once_the_first_is_lost() -> None:
    registry = Registry(RouterConfig())
    first, second = add(registry, "http://a"), add(registry, "http://b")
    welcome(registry, first)
    registry.on_lost(first, "gone")
    welcome(registry, second, model_fingerprint="new")
    assert registry.ready(Role.UNIFIED) == [second]
    with pytest.raises(ConfigError, match="another model"):
        welcome(registry, first, epoch=EpochId("2"))


def test_a_unified_worker_may_prefill_and_others_serve_only_their_role() -> None:
    registry = Registry(RouterConfig())
    prefill = add(registry, "http://a", Role.PREFILL)
    welcome(registry, prefill, role=Role.UNIFIED)
    assert registry.ready(Role.PREFILL) == [prefill]
    assert registry.ready(Role.UNIFIED) == []
    for role in (Role.UNIFIED, Role.PREFILL):
        with pytest.raises(ConfigError, match="--role decode"):
            welcome(registry, add(registry, f"http://{role}", Role.DECODE), role=role)
    with pytest.raises(ConfigError, match="--role prefill"):
        welcome(registry, add(registry, "http://d", Role.PREFILL), role=Role.DECODE)


def test_a_worker_named_twice_is_used_once() -> None:
    registry = Registry(RouterConfig())
    first, second = add(registry, "http://127.0.0.1:1"), add(registry, "http://localhost:1")
    welcome(registry, first, worker_id=WorkerId("same"))
    with pytest.raises(ConfigError, match="same worker"):
        welcome(registry, second, worker_id=WorkerId("same"))


def test_a_worker_with_the_epoch_of_another_one_is_refused() -> None:
    registry = Registry(RouterConfig())
    first, thief = add(registry, "http://a"), add(registry, "http://b")
    welcome(registry, first, epoch=EpochId("mine"))
    with pytest.raises(ConfigError, match="uses the identity of http://a"):
        welcome(registry, thief, epoch=EpochId("mine"))
    assert registry.ready(Role.UNIFIED) == [first]


@pytest.mark.parametrize("changed", [{"role": Role.DECODE}, {"model_fingerprint": "new"}, {"namespace": "new"}])
def test_another_role_or_model_at_the_same_url_is_another_worker(changed: dict[str, Any]) -> None:
    registry = Registry(RouterConfig())
    worker = add(registry)
    welcome(registry, worker)
    registry.on_page_events(worker, PageEvents(sequence=0, changes=(tier_changes(A),)), 1.0)
    welcome(registry, worker, **changed)
    assert worker.state is WorkerState.READY
    assert registry.index.match([joined(A)]) == {}
    assert worker.spec is not None
    assert {name: getattr(worker.spec, name) for name in changed} == changed


def test_a_leaving_worker_gets_no_request_and_is_ready_again_when_it_is_named_again() -> None:
    registry = Registry(RouterConfig())
    worker = add(registry)
    welcome(registry, worker)
    registry.leave(worker)
    welcome(registry, worker, epoch=EpochId("second"))
    assert worker.state is WorkerState.LEAVING
    assert registry.ready(Role.UNIFIED) == []
    assert add(registry, worker.url) is worker
    assert registry.ready(Role.UNIFIED) == []
    welcome(registry, worker)
    assert registry.ready(Role.UNIFIED) == [worker]
    registry.leave(worker)
    registry.remove(worker)
    assert registry.workers == ()


@pytest.mark.parametrize("version", [PROTOCOL_VERSION + 2, OLDEST_PROTOCOL_VERSION - 1])
def test_another_protocol_version_is_refused(version: int) -> None:
    registry = Registry(RouterConfig())
    with pytest.raises(ConfigError, match=f"protocol {version}, this gateway {PROTOCOL_VERSION}"):
        registry.on_welcome(add(registry), Welcome(spec=make_roomy_spec(), protocol_version=version), 0.0)


def test_a_worker_of_the_next_protocol_version_is_accepted() -> None:
    registry = Registry(RouterConfig())
    worker, version = add(registry), PROTOCOL_VERSION + 1
    spec = make_roomy_spec(protocol_version=version)
    registry.on_welcome(worker, Welcome(spec=spec, protocol_version=version), 0.0)
    assert registry.ready(Role.UNIFIED) == [worker]


def test_a_worker_computes_room_load_and_retry_time_from_its_requests_and_reports() -> None:
    registry = Registry(RouterConfig())
    worker = add(registry)
    welcome(registry, worker, max_running_requests=1, max_queued_requests=1)
    caller = ("k", "h", "c")
    worker.take(RequestId("1"), 100, caller)
    assert worker.has_room_for(caller)
    worker.take(RequestId("2"), 50, caller)
    assert not worker.has_room_for(caller)
    assert worker.has_room_for(("another", "h", "c")), "the worker will displace a request of the first caller"
    assert (worker.view(NOTHING_HELD, caller).num_requests, worker.view(NOTHING_HELD, caller).num_pending_tokens) == (
        2,
        150,
    )
    worker.prompt_done(RequestId("1"))
    for request_id in ("1", "2", "2"):
        worker.release(RequestId(request_id))
    registry.on_report(worker, make_load(num_running=5, num_waiting=2, service_s=20.0), 1.0)
    assert worker.retry_after_s() == 8.0, "two requests wait for five places of 20 s each"
    assert (worker.view(NOTHING_HELD, caller).num_requests, worker.view(NOTHING_HELD, caller).num_pending_tokens) == (
        7,
        0,
    )


def test_waiting_requests_that_a_request_passes_do_not_count_for_it() -> None:
    registry = Registry(RouterConfig())
    worker = add(registry)
    welcome(registry, worker, max_running_requests=4, max_queued_requests=20)
    for number in range(14):
        worker.take(RequestId(f"flood{number}"), 10, ("k", "h", "1"))
    for number in range(3):
        worker.take(RequestId(f"mine{number}"), 10, ("l", "h", "1"))

    def num_requests(caller: CallerPath) -> int:
        return worker.view(NOTHING_HELD, caller).num_requests

    assert num_requests(("k", "h", "1")) == 17
    assert num_requests(("l", "h", "1")) == 3 + 4, "its own ones, and four turns of the flood"
    assert num_requests(("m", "h", "1")) == 4, "not less than the places"
    registry.on_report(worker, make_load(num_running=4, num_waiting=31), 1.0)
    assert num_requests(("m", "h", "1")) == 35 - 15, "the callers of requests from other gateways are not known"
