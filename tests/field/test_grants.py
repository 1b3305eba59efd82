"""Grants, which let prefill write into the memory of decode: accepted, forged, impossible, lost and repeated ones."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from kvist.kv.cache import PageCache
from kvist.plan.events import SampledTokens, StepFinished
from kvist.plan.plan import Plan
from kvist.plan.transfers import ToSource, WritePages
from kvist.request import (
    EpochId,
    HandoffId,
    Mode,
    Outcome,
    RequestId,
    Role,
    SampledToken,
)
from kvist.scheduler import Scheduler, SchedulerConfig, build_scheduler
from kvist.testing.specs import make_peer_spec, make_request
from kvist.wire import Closed, Done, Grant, PoolAddress, PrefillPeer, Revoke, Submit

P, D, THIEF = EpochId("prefill"), EpochId("decode"), EpochId("thief")
H = HandoffId("h")
POOL = PoolAddress(transport="shm", location="/pool", num_pages=12, page_bytes=64, layout="l")


def scheduler_of(role: Role) -> Scheduler:
    config = SchedulerConfig(max_running_requests=4, chunked_prefill_size=32, max_prefill_tokens=32, max_model_len=40)
    cache = PageCache(num_pages=12, page_size=4, namespace="n")
    return build_scheduler(role, config, cache, D if role is Role.DECODE else P, make_peer_spec(POOL))


def submit(mode: Mode, **fields: object) -> Submit:
    request = make_request("r", tuple(range(10)), max_tokens=4)
    return Submit(request=request, mode=mode, handoff_id=H, **fields)  # type: ignore[arg-type]


TO_PREFILL = submit(Mode.PREFILL, target_epoch=D)
TO_DECODE = submit(Mode.DECODE, prefill=PrefillPeer(worker_id="p", endpoint="tcp://p", epoch=P))  # type: ignore[arg-type]
GRANT = Grant(
    handoff_id=H,
    request_id=RequestId("r"),
    target_epoch=D,
    source_epoch=P,
    target=make_peer_spec(POOL),
    first_page=0,
    page_ids=(9, 10, 11),
)
FORGED = msgspec.structs.replace(GRANT, target_epoch=THIEF, page_ids=(0, 1, 2))


def messages_of(plan: Plan) -> list[object]:
    return [order.message for order in plan.messages]


@pytest.mark.case("forged-grant")
@pytest.mark.parametrize("forged_first", [True, False])
def test_prefill_accepts_a_grant_only_from_the_decode_engine_that_the_gateway_named(forged_first: bool) -> None:
    prefill = scheduler_of(Role.PREFILL)
    plan = prefill.step(0.0, [FORGED, TO_PREFILL] if forged_first else [TO_PREFILL, FORGED])
    (refused,) = messages_of(plan)
    assert isinstance(refused, Closed)
    assert (refused.target_epoch, refused.error_code) == (THIEF, "handoff_failed")
    assert prefill.status().totals["foreign_grants"] == 1
    assert plan.ended == ()  # the request still waits for the valid Grant
    assert prefill.step(0.1, [GRANT]).watched_epochs == {D}


@pytest.mark.case("forged-grant")
def test_prefill_writes_only_to_the_pages_of_the_accepted_grant() -> None:
    prefill = scheduler_of(Role.PREFILL)
    batch = prefill.step(0.0, [TO_PREFILL, GRANT, FORGED]).batch
    assert batch is not None
    plan = prefill.step(0.1, [StepFinished(step_id=batch.step_id, sampled=SampledTokens(token_ids=[5])), FORGED])
    assert [(job.pool, job.peer_page_ids) for job in plan.transfers if isinstance(job, WritePages)] == [
        (POOL, (9, 10, 11))
    ]


@pytest.mark.parametrize("page_ids", [(9, 10, 10), (9, 10, 12), (-1, 10, 11), (9, 10), (8, 9, 10, 11)])
def test_a_grant_with_impossible_pages_fails_only_its_own_request(page_ids: tuple[int, ...]) -> None:
    prefill = scheduler_of(Role.PREFILL)
    prefill.step(0.0, [TO_PREFILL])
    plan = prefill.step(0.1, [msgspec.structs.replace(GRANT, page_ids=page_ids)])
    assert [(ended.outcome, ended.error_code) for ended in plan.ended] == [(Outcome.FAILED, "handoff_failed")]
    assert plan.transfers == ()


def test_a_revoke_of_another_engine_does_not_end_a_request_that_waits_for_its_grant() -> None:
    prefill = scheduler_of(Role.PREFILL)
    prefill.step(0.0, [TO_PREFILL])
    plan = prefill.step(0.1, [Revoke(handoff_id=H, target_epoch=THIEF, reason="because")])
    assert (plan.ended, plan.messages) == ((), ())
    assert prefill.step(0.2, [GRANT]).watched_epochs == {D}


def test_a_prefill_request_that_names_no_decode_worker_is_refused() -> None:
    plan = scheduler_of(Role.PREFILL).step(0.0, [submit(Mode.PREFILL)])
    assert [(ended.outcome, ended.error_code) for ended in plan.ended] == [(Outcome.FAILED, "invalid_request")]


# ---------------------------------------------------------------- lost and repeated Grants


@pytest.mark.case("stolen-identity")
def test_decode_repeats_a_grant_at_growing_intervals_until_it_is_answered() -> None:
    decode = scheduler_of(Role.DECODE)
    (first,) = decode.step(0.0, [TO_DECODE]).messages
    assert isinstance(first, ToSource)
    again = []
    for tenth in range(1, 100):
        for order in decode.step(tenth / 10, []).messages:
            assert isinstance(order, ToSource)
            assert order == replace(first, repeated=True)
            again.append(tenth / 10)
    assert again == [1.0, 3.0, 7.0]
    done = Done(
        handoff_id=H, target_epoch=D, source_epoch=P, num_pages=3, checksum="s", first_token=SampledToken(token_id=1)
    )
    decode.step(10.0, [done])
    assert all(decode.step(10.0 + second, []).messages == () for second in range(1, 60))


@pytest.mark.case("stolen-identity")
def test_a_repeated_grant_changes_nothing_at_prefill() -> None:
    prefill = scheduler_of(Role.PREFILL)
    prefill.step(0.0, [TO_PREFILL, GRANT])
    plan = prefill.step(1.0, [GRANT])
    assert (plan.messages, plan.transfers, plan.ended) == ((), (), ())


@pytest.mark.case("stolen-identity")
def test_a_lost_refusal_is_sent_again_for_a_repeated_grant() -> None:
    prefill = scheduler_of(Role.PREFILL)
    bad = msgspec.structs.replace(GRANT, page_ids=(1,))
    (lost,) = messages_of(prefill.step(0.0, [TO_PREFILL, bad]))
    assert messages_of(prefill.step(1.0, [bad])) == [lost]
