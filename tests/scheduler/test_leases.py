"""Leased prompts: their pages stay in the device pool, for a limited time and within limits, and starve no request."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.lease_messages import LeaseAnswer, LeaseCommand, LeaseStatus
from kvist.request import LeaseTerms, Outcome, Role
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.engine import SimEngine, small_config

TOTALS = ("granted", "refused", "renewed", "expired", "given_up")


def engine_of(num_pages: int = 20, **config: Any) -> SimEngine:
    """Return an engine with pages of 4 tokens; by default its leases hold at most 10 pages, 5 of each key."""
    limits = {"max_lease_fraction": 0.5, "max_lease_fraction_per_key": 0.25, "max_model_len": 400, **config}
    return SimCluster().start("u", role=Role.UNIFIED, config=small_config(**limits), num_pages=num_pages)


def lease(engine: SimEngine, name: str, prompt: list[int], *, key: str = "", ttl_s: float = 10.0) -> LeaseStatus | str:
    """Lease a prompt; return the lease, or the code of the error."""
    terms = LeaseTerms(lease_id=name, ttl_s=ttl_s)
    request = sim_request(f"lease {name}", prompt, max_tokens=0, client=f"{key}/h/1", lease=terms)
    engine.world.submit(request, engine)
    engine.world.settle(dt_s=0.0)
    engine.world.check_settled()
    (ended,) = engine.world.ended[request.request_id, engine.epoch]
    if ended.error_code is not None:
        return ended.error_code
    (status,) = [chunk.lease for _, chunk in engine.world.chunks[request.request_id] if chunk.lease is not None]
    return status


def command(engine: SimEngine, action: Any, lease_id: str = "", *, key: str = "", ttl_s: float = 0.0) -> LeaseAnswer:
    engine.events.append(LeaseCommand(call_id="c", action=action, owner=key, lease_id=lease_id, ttl_s=ttl_s))
    (answer,) = engine.step().lease_answers
    return answer


def run(engine: SimEngine, name: str, prompt: list[int], max_tokens: int = 1) -> int:
    """Run a request to its end; return the number of its cached prompt tokens."""
    engine.world.submit(sim_request(name, prompt, max_tokens=max_tokens, ignore_eos=True), engine)
    engine.world.settle(dt_s=0.0)  # time does not end a lease
    engine.world.check_settled()
    assert engine.world.outcome(name, engine) is Outcome.FINISHED
    return sum(chunk.num_cached_tokens or 0 for _, chunk in engine.world.chunks[name])


def leased(engine: SimEngine) -> int:
    return engine.scheduler.status().leases.num_pages


def totals(engine: SimEngine) -> dict[str, int]:
    found = engine.scheduler.status().totals
    return {name: int(count) for name in TOTALS if (count := found[f"leases_{name}"])}


def others(engine: SimEngine, num: int = 8) -> None:
    """Use all pages for other prompts."""
    for number in range(num):
        run(engine, f"other {number} {engine.world.now_s}", [number + 5] * 20)


def test_leased_pages_stay_cached_until_their_time_is_over() -> None:
    engine = engine_of()
    status = lease(engine, "a", [1] * 18)
    assert status == LeaseStatus(lease_id="a", num_pages=4, num_tokens=16, left_s=10.0)
    others(engine)
    assert run(engine, "again", [1] * 18) == 16
    engine.world.now_s += 10.1
    engine.step()
    assert (leased(engine), totals(engine)) == (0, {"granted": 1, "expired": 1})
    others(engine)
    assert run(engine, "late", [1] * 18) == 0


def test_the_engine_wakes_when_the_time_of_a_lease_is_over() -> None:
    engine = engine_of()
    lease(engine, "a", [1] * 8, ttl_s=3.0)
    assert not engine.scheduler.has_work(), "a lease is no work: a worker stops without waiting for it"
    assert engine.step().wake_at_s == pytest.approx(engine.world.now_s + 3.0)


def test_a_lease_is_renewed_listed_and_ended_by_its_owner_alone() -> None:
    engine = engine_of()
    lease(engine, "a", [1] * 8, key="k")
    engine.world.now_s += 9.0
    (renewed,) = command(engine, "renew", "a", key="k", ttl_s=5.0).leases
    assert renewed.left_s == pytest.approx(5.0)
    engine.world.now_s += 4.0
    assert [each.lease_id for each in command(engine, "list", key="k").leases] == ["a"]
    assert command(engine, "list", key="other").leases == ()
    for action in ("renew", "end", "list"):
        refused = command(engine, action, "a", key="other", ttl_s=5.0)
        assert (refused.leases, refused.error_code) == ((), "lease_not_found")
    assert [each.num_pages for each in command(engine, "end", "a", key="k").leases] == [2]
    assert (leased(engine), totals(engine)) == (0, {"granted": 1, "renewed": 1})
    assert "Lease the prompt again" in command(engine, "renew", "a", key="k", ttl_s=5.0).message


def test_pages_in_several_leases_count_once() -> None:
    engine = engine_of()
    for number in range(8):
        assert isinstance(lease(engine, f"a{number}", [1] * 16, key="k"), LeaseStatus)
    assert leased(engine) == 4
    for number in range(8):
        assert leased(engine) == 4
        command(engine, "end", f"a{number}", key="k")
    assert leased(engine) == 0


def test_leases_of_one_key_and_of_all_keys_are_limited() -> None:
    engine = engine_of()
    assert isinstance(lease(engine, "a", [1] * 16, key="k"), LeaseStatus)
    assert lease(engine, "b", [2] * 8, key="k") == "overloaded", "a key has at most 5 pages"
    assert isinstance(lease(engine, "c", [2] * 20, key="l"), LeaseStatus)
    assert lease(engine, "d", [3] * 8, key="m") == "overloaded", "all keys together have at most 10"
    assert lease(engine, "e", [3] * 24, key="m") == "invalid_request", "no lease has so many"
    assert totals(engine) == {"granted": 2, "refused": 2}
    command(engine, "end", "a", key="k")
    assert isinstance(lease(engine, "f", [3] * 8, key="m"), LeaseStatus)


def test_without_keys_only_the_limit_of_all_leases_counts() -> None:
    engine = engine_of()
    assert isinstance(lease(engine, "a", [1] * 40), LeaseStatus)
    assert lease(engine, "b", [2] * 4) == "overloaded"


@pytest.mark.parametrize(
    ("prompt", "fraction"), [([1] * 3, 0.5), ([1] * 44, 0.5), ([1] * 8, 0.0)], ids=["no page", "too long", "off"]
)
def test_a_prompt_that_can_never_be_leased_is_an_invalid_request(prompt: list[int], fraction: float) -> None:
    assert lease(engine_of(max_lease_fraction=fraction), "a", prompt) == "invalid_request"


def test_a_request_with_an_answer_leases_nothing() -> None:
    engine = engine_of()
    terms = LeaseTerms(lease_id="a", ttl_s=1.0)
    engine.world.submit(sim_request("r", [1] * 8, max_tokens=1, lease=terms), engine)
    engine.world.settle()
    assert engine.world.outcome("r", engine) is Outcome.FAILED


def test_two_requests_for_the_last_room_get_one_lease() -> None:
    engine = engine_of()
    for name in ("a", "b"):
        terms = LeaseTerms(lease_id=name, ttl_s=10.0)
        request = sim_request(name, [ord(name) % 20] * 24, max_tokens=0, lease=terms)
        engine.world.submit(request, engine)
    engine.world.settle(dt_s=0.0)
    engine.world.check_settled()
    assert sorted(engine.world.outcome(name, engine).value for name in ("a", "b")) == ["failed", "finished"]
    assert totals(engine) == {"granted": 1, "refused": 1}


def test_a_repeated_request_gets_its_lease_again() -> None:
    engine = engine_of()
    lease(engine, "a", [1] * 8, ttl_s=1.0)
    terms = LeaseTerms(lease_id="a", ttl_s=9.0)
    engine.world.submit(sim_request("repeated", [1] * 8, max_tokens=0, lease=terms, client="/h/1"), engine)
    engine.world.settle(dt_s=0.0)
    (status,) = command(engine, "list").leases
    assert status.left_s == pytest.approx(9.0)
    engine.world.submit(sim_request("of another", [2] * 8, max_tokens=0, lease=terms, client="k/h/1"), engine)
    engine.world.settle(dt_s=0.0)
    assert engine.world.outcome("of another", engine) is Outcome.FAILED


def test_a_prompt_that_does_not_fit_beside_the_leases_ends_those_that_end_first() -> None:
    engine = engine_of()
    lease(engine, "late", [1] * 20, ttl_s=100.0)
    lease(engine, "soon", [2] * 20, ttl_s=5.0)
    run(engine, "long", [3] * 56)
    assert [each.lease_id for each in command(engine, "list").leases] == ["late"]
    run(engine, "whole pool", [4] * 78)
    assert (leased(engine), totals(engine)) == (0, {"granted": 2, "given_up": 2})


def test_a_prompt_that_fits_beside_the_leases_waits_for_other_requests_instead() -> None:
    engine = engine_of()
    lease(engine, "a", [1] * 40)
    for number in range(4):
        engine.world.submit(sim_request(f"r{number}", [number + 2] * 30, max_tokens=4, ignore_eos=True), engine)
    engine.world.settle(dt_s=0.0)
    engine.world.check_settled()
    assert (leased(engine), totals(engine)) == (10, {"granted": 1})


def test_a_continuation_of_a_leased_prompt_does_not_end_its_lease() -> None:
    engine = engine_of()
    lease(engine, "a", [1] * 40)
    engine.world.submit(sim_request("stream", [3] * 8, max_tokens=8, ignore_eos=True), engine)
    engine.world.deliver(("gateway", "u"))
    engine.step()
    assert run(engine, "continued", [1] * 40 + [2] * 36) == 40, "it waits for the pages of the stream"
    assert (leased(engine), totals(engine)) == (10, {"granted": 1})


def test_a_stream_that_grows_into_the_leases_goes_on() -> None:
    engine = engine_of()
    lease(engine, "a", [1] * 20, ttl_s=5.0)
    lease(engine, "b", [2] * 20, ttl_s=50.0)
    run(engine, "stream", [3] * 4, max_tokens=70)
    assert totals(engine) == {"granted": 2, "given_up": 2}


def test_a_flush_keeps_leased_pages() -> None:
    engine = engine_of()
    lease(engine, "a", [1] * 16)
    engine.cache.flush()
    assert run(engine, "again", [1] * 18) == 16
