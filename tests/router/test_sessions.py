"""Sessions: a hint that breaks ties between workers, and never outweighs load or known pages."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvist.kv.keys import page_digests
from kvist.request import FinishReason, Role, WorkerId
from kvist.router import sessions as module
from kvist.router.config import RouterConfig, RoutingOptions
from kvist.router.placement import Placement
from kvist.router.policies import POLICIES
from kvist.router.policy import FleetView, Policy, Prompt, WorkerView
from kvist.router.registry import Worker
from kvist.router.sessions import Sessions
from kvist.testing.page_events import joined
from kvist.testing.router_bench import RouterBench, read_all, settle
from kvist.testing.specs import make_request

PROMPT = Prompt(num_tokens=330)
HINTED = ("cache_aware", "cost", "least_loaded")


def policy(name: str) -> Policy:
    return POLICIES[name].make({})


def view(name: str, **fields: object) -> WorkerView:
    known = WorkerView(
        worker_id=WorkerId(name),
        page_size=16,
        num_requests=2,
        num_pending_tokens=0,
        num_known_pages=0,
        max_running_requests=8,
        service_s=1.0,
    )
    return replace(known, **fields)  # type: ignore[arg-type]


def choice(name: str, *workers: WorkerView) -> str:
    return policy(name).choose(PROMPT, FleetView.of_workers(workers)).decode.worker_id


@pytest.mark.parametrize("name", HINTED)
def test_of_equal_workers_the_one_that_served_the_session_is_chosen(name: str) -> None:
    assert choice(name, view("a"), view("b")) == "a"
    assert choice(name, view("a"), view("b", served_session=True)) == "b"


@pytest.mark.parametrize("name", HINTED)
def test_the_worker_of_the_session_is_not_chosen_over_one_with_less_load(name: str) -> None:
    assert choice(name, view("a", num_requests=1), view("b", served_session=True)) == "a"


@pytest.mark.parametrize("name", HINTED)
def test_the_decode_worker_of_the_session_is_chosen_for_a_pair(name: str) -> None:
    fleet = FleetView(
        alone=(), prefill=(view("p", role=Role.PREFILL),), decode=(view("d"), view("e", served_session=True))
    )
    assert policy(name).choose(PROMPT, fleet).decode.worker_id == "e"


def test_the_sessions_used_least_recently_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SESSIONS", 2)
    sessions, worker = Sessions(), WorkerId("w")
    for name in ("", "a", "b", "a", "c"):
        sessions.remember(name, worker)
    assert len(sessions) == 2
    assert [bool(sessions.last(name)) for name in ("", "a", "b", "c")] == [False, True, False, True]


async def served(bench: RouterBench, *, session: str) -> Worker:
    sent = len(bench.engines.sent)
    task = asyncio.create_task(
        read_all(bench.dispatcher.generate(make_request("r", range(100)), Placement(session=session)))
    )
    await settle()
    (worker,) = {worker for worker, _ in bench.engines.sent[sent:]}
    bench.engines.emit(worker, 0, 7, finish=FinishReason.STOP)
    bench.engines.end(worker)
    await task
    return worker


async def test_a_session_stays_at_its_worker_until_another_one_has_its_pages() -> None:
    bench = RouterBench(RouterConfig(routing=RoutingOptions(policy="cost")))
    workers = [bench.engines.join(name) for name in ("a", "b", "c")]
    bench.registry.index.store(workers[0].worker_id, "device", joined(*page_digests(tuple(range(100)), 16, "n", "")))
    assert await served(bench, session="") is workers[0]
    bench.engines.lose(workers[0])
    first = await served(bench, session="s")
    for _ in range(3):
        assert await served(bench, session="s") is first
    other = next(worker for worker in workers[1:] if worker is not first)
    bench.registry.index.store(other.worker_id, "device", joined(*page_digests(tuple(range(100)), 16, "n", "")))
    assert await served(bench, session="s") is other, "known pages count for more"
