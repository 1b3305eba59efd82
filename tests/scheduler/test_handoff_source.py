"""The prefill side of one handoff, message by message: each message on time, missing, and repeated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from kvist.plan.events import Event, StepFailed
from kvist.plan.plan import Plan
from kvist.plan.transfers import PeerDied, StopWrites, WritePages, WritesCompleted, WritesFailed
from kvist.protocol import PROTOCOL_VERSION
from kvist.request import EpochId, FinishReason, HandoffId, Mode, Outcome, RequestId, Role
from kvist.simulation.cluster import sim_request
from kvist.simulation.engine import PAGE_BYTES
from kvist.testing.specs import make_peer_spec, submit_full
from kvist.wire import Abort, Ack, Closed, Done, Grant, PeerSpec, Revoke, Submit
from tests.scheduler.handoff_bench import FIRST, PROMPT, Bench, D, H, P, ends, messages, pool


def prefill_arrived(request_id: str = "r", handoff_id: HandoffId = H, prompt: Sequence[int] = PROMPT) -> Submit:
    request = sim_request(request_id, list(prompt), ignore_eos=True)
    return Submit(request=request, mode=Mode.PREFILL, handoff_id=handoff_id, target_epoch=D)


def written_pages(plan: Plan) -> list[int]:
    """Return the peer's pages that the plan writes, in order; the plan has no other transfers."""
    writes = [job for job in plan.transfers if isinstance(job, WritePages)]
    assert len(writes) == len(plan.transfers)
    return [page for job in writes for page in job.peer_page_ids]


def grant(
    first_page: int = 0,
    *,
    page_ids: Sequence[int] | None = None,
    handoff_id: HandoffId = H,
    target: PeerSpec | None = None,
) -> Grant:
    return Grant(
        handoff_id=handoff_id,
        request_id=RequestId("r"),
        target_epoch=D,
        source_epoch=P,
        target=target or make_peer_spec(pool(D)),
        first_page=first_page,
        page_ids=tuple(range(7 + first_page, 10) if page_ids is None else page_ids),
    )


def written(num_pages: int) -> WritesCompleted:
    return WritesCompleted(handoff_id=H, num_pages=num_pages, checksum=f"sum{num_pages}")


def revoke() -> Revoke:
    return Revoke(handoff_id=H, target_epoch=D, reason="why not")


def computed(role: Role = Role.PREFILL, **config: Any) -> Bench:
    """Return a scheduler that has computed the prompt and requested all writes."""
    bench = Bench(role, **{"chunked_prefill_size": 10, **config})
    bench.step(prefill_arrived(), grant())
    bench.finish()
    return bench


def done_sent(**config: Any) -> Bench:
    bench = computed(**config)
    bench.step(written(3))
    return bench


def test_prefill_writes_pages_as_chunks_finish_and_the_partial_page_last() -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=5)
    bench.step(prefill_arrived(), grant())
    first = bench.finish()
    second = bench.finish()
    (job,) = first.transfers
    assert isinstance(job, WritePages)
    assert (len(job.page_ids), job.peer_page_ids) == (1, (7,))
    (job,) = second.transfers
    assert isinstance(job, WritePages)
    assert job.peer_page_ids == (8, 9)
    assert not messages(second)


def test_prefill_sends_the_first_token_before_any_write_but_never_before_the_grant() -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=10)
    bench.step(prefill_arrived())
    assert not bench.finish().chunks
    plan = bench.step(grant())
    (chunk,) = plan.chunks
    assert (chunk.position, chunk.token_ids, chunk.num_cached_tokens) == (0, (5,), 0)
    assert len(plan.transfers) == 1, "the write starts after the tokens of the plan were sent"
    assert not plan.ended


def test_done_carries_the_first_token_and_the_checksum_once_every_page_is_written() -> None:
    bench = computed()
    assert not messages(bench.step(written(2)))
    (done,) = messages(bench.step(written(3)))
    assert isinstance(done, Done)
    assert (done.num_pages, done.checksum, done.first_token, done.finish_reason) == (3, "sum3", FIRST, None)


@pytest.mark.parametrize("is_early", [False, True])
def test_done_carries_the_wait_for_the_grant_and_the_time_of_the_last_copy(is_early: bool) -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=10)
    bench.step(prefill_arrived(), *([grant()] if is_early else []))
    bench.now_s = 1.0
    bench.finish()
    bench.now_s = 1.5
    bench.step(*([] if is_early else [grant()]))
    bench.now_s = 1.75
    (done,) = messages(bench.step(written(3)))
    assert isinstance(done, Done)
    assert (done.grant_wait_s, done.last_copy_s) == ((0.0, 0.75) if is_early else (0.5, 0.25))
    bench.now_s = 9.0
    bench.step(Ack(handoff_id=H, target_epoch=D))
    totals = bench.scheduler.status().totals
    assert totals["handoff_grant_wait_seconds"] == done.grant_wait_s
    assert totals["handoff_last_copy_seconds"] == done.last_copy_s


def test_done_carries_the_finish_reason_of_a_one_token_answer() -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=10)
    request = sim_request("r", PROMPT, max_tokens=1)
    bench.step(Submit(request=request, mode=Mode.PREFILL, handoff_id=H, target_epoch=D), grant())
    bench.finish()
    (done,) = messages(bench.step(written(3)))
    assert isinstance(done, Done)
    assert done.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_grant_may_arrive_before_during_or_after_the_prompt_is_computed(when: str) -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=5)
    message = grant()
    plans = [
        bench.step(*([message] if when == "before" else []), prefill_arrived()),
        bench.finish(*([message] if when == "during" else [])),
        bench.finish(),
        bench.step(*([message] if when == "after" else [])),
    ]
    assert [page for plan in plans for page in written_pages(plan)] == [7, 8, 9]
    assert isinstance(messages(bench.step(written(3)))[0], Done)


def test_prefill_does_not_write_pages_that_decode_has_cached() -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=10)
    bench.step(prefill_arrived(), grant(first_page=2))
    (job,) = bench.finish().transfers
    assert isinstance(job, WritePages)
    assert job.peer_page_ids == (9,)


def test_an_empty_grant_is_answered_with_done_without_a_write() -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=10)
    bench.step(prefill_arrived(prompt=range(8)), grant(first_page=2, page_ids=()))
    plan = bench.finish()
    assert not plan.transfers
    (done,) = messages(plan)
    assert isinstance(done, Done)
    assert done.num_pages == 0


def test_prefill_writes_cached_pages_before_it_computes_the_rest() -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=10)
    bench.step(submit_full(sim_request("old", PROMPT, max_tokens=1)))
    bench.finish()
    plan = bench.step(prefill_arrived(), grant())
    (job,) = plan.transfers
    assert isinstance(job, WritePages)
    assert job.peer_page_ids == (7, 8)
    assert plan.batch is not None
    assert plan.batch.items[0].start == 8


def test_the_ack_ends_the_request_and_frees_its_pages() -> None:
    bench = done_sent()
    assert bench.busy_pages == 3
    plan = bench.step(Ack(handoff_id=H, target_epoch=D))
    assert ends(plan) == [(Outcome.FINISHED, None)]
    assert bench.busy_pages == 0
    assert plan.watched_epochs == frozenset()
    totals = bench.scheduler.status().totals
    assert (totals["handoffs_sent"], totals["handoff_pages"], totals["handoff_bytes"]) == (1, 3, 3 * PAGE_BYTES)


def test_an_ack_from_another_epoch_is_ignored() -> None:
    bench = done_sent()
    assert not bench.step(Ack(handoff_id=H, target_epoch=EpochId("D#0"))).ended


def test_done_is_repeated_until_the_answer_comes() -> None:
    bench = done_sent()
    for _ in range(3):
        assert bench.plan.wake_at_s == bench.now_s + 1.0
        bench.now_s += 1.0
        assert isinstance(messages(bench.step())[0], Done)


def test_an_abort_after_done_keeps_the_pages_until_decode_answers() -> None:
    bench = done_sent()
    assert ends(bench.step(Abort(request_id=RequestId("r")))) == [(Outcome.ABORTED, None)]
    assert bench.busy_pages == 3
    assert bench.scheduler.has_work()
    assert not bench.step(Ack(handoff_id=H, target_epoch=D)).ended
    assert bench.busy_pages == 0
    assert not bench.scheduler.has_work()


@pytest.mark.parametrize("what", ["abort", "revoke", "death"])
def test_pages_with_pending_writes_are_kept_until_the_transport_has_stopped(what: str) -> None:
    bench = computed()
    events: dict[str, Event] = {
        "abort": Abort(request_id=RequestId("r")),
        "revoke": revoke(),
        "death": PeerDied(epoch=D),
    }
    event = events[what]
    plan = bench.step(event)
    assert len(plan.ended) == 1
    assert plan.transfers == (StopWrites(handoff_id=H),)
    assert not messages(plan)
    assert bench.busy_pages == 3
    plan = bench.step(written(1))
    assert [type(message) for message in messages(plan)] == ([] if what == "death" else [Closed])
    assert not plan.ended
    assert bench.busy_pages == 0


def test_a_report_made_before_stop_writes_does_not_close_the_handoff() -> None:
    bench = computed()
    assert not messages(bench.step(revoke(), written(1)))
    assert bench.busy_pages == 3
    assert isinstance(messages(bench.step(written(2)))[0], Closed)


def test_a_revoke_without_pending_writes_is_answered_with_closed_at_once() -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=3)
    bench.step(prefill_arrived(), grant())
    plan = bench.step(revoke())
    (closed,) = messages(plan)
    assert isinstance(closed, Closed)
    assert (closed.target_epoch, closed.source_epoch, closed.error_code) == (D, P, "handoff_failed")
    assert ends(plan) == [(Outcome.FAILED, "handoff_failed")]
    assert bench.busy_pages > 0  # the pending step still writes them
    bench.finish()
    assert bench.busy_pages == 0


@pytest.mark.parametrize("first", ["abort", "revoke"])
def test_a_handoff_whose_client_has_left_is_cancelled_at_prefill_and_not_failed(first: str) -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=3)
    bench.step(prefill_arrived(), grant())
    event: Event = (
        Abort(request_id=RequestId("r")) if first == "abort" else msgspec.structs.replace(revoke(), cancelled=True)
    )
    plan = bench.step(event)
    (closed,) = messages(plan)
    assert isinstance(closed, Closed)
    assert closed.error_code is None
    assert [outcome for outcome, _ in ends(plan)] == [Outcome.ABORTED]
    totals = bench.scheduler.status().totals
    assert (totals["handoffs_cancelled"], totals["handoffs_failed"]) == (1, 0)
    assert (totals["requests_aborted"], totals["requests_failed"]) == (1, 0)


def test_a_repeated_revoke_is_answered_each_time() -> None:
    bench = done_sent()
    for _ in range(3):
        assert isinstance(messages(bench.step(revoke()))[0], Closed)


def test_a_revoke_that_arrives_before_its_request_fails_the_request() -> None:
    bench = Bench(Role.PREFILL)
    bench.step(grant())
    assert isinstance(messages(bench.step(revoke()))[0], Closed)
    plan = bench.step(prefill_arrived())
    assert ends(plan) == [(Outcome.FAILED, "handoff_failed")]
    assert plan.batch is None


def test_a_revoked_early_grant_frees_its_place() -> None:
    bench = Bench(Role.PREFILL, max_remembered_handoffs=1)
    bench.step(grant(), revoke())
    assert not messages(bench.step(grant(handoff_id=HandoffId("next"))))


def test_a_grant_after_the_end_is_answered_with_closed() -> None:
    bench = Bench(Role.PREFILL)
    bench.step(prefill_arrived(), Abort(request_id=RequestId("r")))
    (closed,) = messages(bench.step(grant()))
    assert isinstance(closed, Closed)


def test_a_grant_for_another_epoch_is_answered_with_closed() -> None:
    bench = Bench(Role.PREFILL)
    stale = msgspec.structs.replace(grant(), source_epoch=EpochId("P#0"))
    (closed,) = messages(bench.step(prefill_arrived(), stale))
    assert isinstance(closed, Closed)
    assert (closed.source_epoch, closed.error_code) == (P, "worker_lost")
    assert bench.scheduler.has_work()


def test_an_early_grant_without_a_request_is_closed_after_the_grant_timeout() -> None:
    bench = Bench(Role.PREFILL, grant_timeout_s=5.0)
    assert bench.step(grant()).wake_at_s == 5.0
    bench.now_s = 5.0
    (closed,) = messages(bench.step())
    assert isinstance(closed, Closed)
    assert closed.error_code == "handoff_failed"


def test_early_grants_are_bounded_and_the_oldest_is_closed() -> None:
    bench = Bench(Role.PREFILL, max_remembered_handoffs=2)
    plan = bench.step(*(grant(handoff_id=HandoffId(name)) for name in "xyz"))
    (closed,) = messages(plan)
    assert isinstance(closed, Closed)
    assert (closed.handoff_id, closed.error_code) == ("x", "overloaded")


def test_a_refused_request_closes_its_early_grant_with_the_same_code() -> None:
    bench = Bench(Role.PREFILL, num_pages=2)
    bench.step(grant())
    plan = bench.step(prefill_arrived())
    assert ends(plan) == [(Outcome.FAILED, "context_length_exceeded")]
    (closed,) = messages(plan)
    assert isinstance(closed, Closed)
    assert closed.error_code == "context_length_exceeded"


@pytest.mark.parametrize(
    "bad",
    [
        grant(target=make_peer_spec(pool(D, layout="another"))),
        grant(target=make_peer_spec(msgspec.structs.replace(pool(D), page_bytes=PAGE_BYTES * 2))),
        grant(target=make_peer_spec(pool(D), dtype="bfloat16")),
        grant(target=make_peer_spec(pool(D), page_size=32)),
        grant(target=make_peer_spec(pool(D), model_fingerprint="another")),
        grant(target=make_peer_spec(pool(D), protocol_version=PROTOCOL_VERSION + 2)),
        grant(target=make_peer_spec(pool(D), host_id="another")),
        grant(target=make_peer_spec(msgspec.structs.replace(pool(D), transport="another"))),
        grant(page_ids=(7, 8)),
        grant(page_ids=(7, 8, 12)),
        msgspec.structs.replace(grant(), first_page=-1, page_ids=(7, 8, 9, 10)),
    ],
)
def test_an_unusable_grant_is_refused_before_a_byte_is_written(bad: Grant) -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=10)
    plan = bench.step(prefill_arrived(), bad)
    assert ends(plan) == [(Outcome.FAILED, "handoff_failed")]
    assert isinstance(messages(plan)[0], Closed)
    assert not plan.transfers


def test_failed_writes_close_the_handoff() -> None:
    bench = computed()
    plan = bench.step(WritesFailed(handoff_id=H, message="no such pool"))
    assert ends(plan) == [(Outcome.FAILED, "handoff_failed")]
    (closed,) = messages(plan)
    assert isinstance(closed, Closed)
    assert "no such pool" in closed.message
    assert bench.busy_pages == 0


def test_a_failed_step_closes_the_handoff_and_caches_nothing() -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=10)
    plan = bench.step(prefill_arrived(), grant())
    assert plan.batch is not None
    plan = bench.step(StepFailed(step_id=plan.batch.step_id, message="fire"))
    assert ends(plan) == [(Outcome.FAILED, "step_failed")]
    assert isinstance(messages(plan)[0], Closed)
    assert bench.scheduler.status().pages.free == 12


def test_waiting_for_a_grant_is_bounded_also_after_the_prompt_is_computed() -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=10, grant_timeout_s=5.0)
    bench.step(prefill_arrived())
    bench.finish()
    bench.now_s = 5.0
    assert ends(bench.step()) == [(Outcome.FAILED, "handoff_failed")]
    assert bench.busy_pages == 0


def test_waiting_for_an_ack_is_bounded_but_the_pages_stay() -> None:
    bench = done_sent(handoff_timeout_s=5.0)
    bench.now_s = 5.0
    plan = bench.step()
    assert ends(plan) == [(Outcome.FAILED, "handoff_failed")]
    assert bench.busy_pages == 3
    assert plan.watched_epochs == {D}
    bench.step(PeerDied(epoch=D))
    assert bench.busy_pages == 0


def test_an_ungranted_prefill_is_preempted_for_a_granted_one_and_sends_its_first_token_once() -> None:
    bench = Bench(Role.PREFILL, num_pages=4, chunked_prefill_size=10, max_model_len=16)
    bench.step(prefill_arrived("eager", HandoffId("e")))
    assert not bench.finish().chunks
    plan = bench.step(prefill_arrived("granted", H, range(20, 30)), grant())
    assert plan.batch is not None
    assert bench.running == ["granted"]
    bench.finish()
    bench.step(written(3))
    bench.step(Ack(handoff_id=H, target_epoch=D))
    assert bench.plan.batch is None  # it waits for its own Grant
    plan = bench.step(grant(handoff_id=HandoffId("e")))
    assert [chunk.request_id for chunk in plan.chunks] == ["eager"], (
        "its first token was sampled before it was preempted"
    )
    assert plan.batch is not None
    assert not plan.batch.items[0].samples
    plan = bench.finish()
    assert not plan.chunks
    assert written_pages(plan)[-1] == 9


def test_a_running_stream_preempts_an_ungranted_prefill() -> None:
    bench = Bench(Role.UNIFIED, num_pages=5, chunked_prefill_size=10, max_model_len=20)
    bench.step(prefill_arrived())
    bench.finish()
    stream = sim_request("s", [20, 21, 22, 23, 24, 25, 26], max_tokens=6, ignore_eos=True)
    bench.step(submit_full(stream))
    positions = [chunk.position for _ in range(6) for chunk in bench.finish().chunks]
    assert positions == [0, 1, 2, 3, 4, 5]
    assert bench.scheduler.status().totals["preemptions"] == 1
    assert bench.scheduler.status().num_waiting == 1


def test_a_granted_prefill_without_pages_times_out_and_sends_closed() -> None:
    bench = Bench(Role.UNIFIED, num_pages=4, max_model_len=16, queue_timeout_s=5.0)
    stream = sim_request("s", [20, 21, 22, 23, 24, 25, 26], max_tokens=9, ignore_eos=True)
    bench.step(submit_full(stream), prefill_arrived(), grant())
    bench.now_s = 5.0
    plan = bench.finish()
    assert ends(plan) == [(Outcome.FAILED, "timeout")]
    assert isinstance(messages(plan)[0], Closed)


def test_prefill_of_a_resumed_request_hands_over_prompt_and_output_so_far() -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=20)
    request = sim_request("r", PROMPT[:8], output_token_ids=(3, 4), max_tokens=9)
    bench.step(Submit(request=request, mode=Mode.PREFILL, handoff_id=H, target_epoch=D), grant())
    plan = bench.finish()
    assert plan.chunks[0].position == 2
    assert written_pages(plan) == [7, 8, 9]
