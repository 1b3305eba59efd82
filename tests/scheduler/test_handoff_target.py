"""The decode side of one handoff, message by message: each message on time, missing, and repeated."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvist.plan.transfers import PagesVerified, PeerDied, ToSource, VerifyPages
from kvist.request import EpochId, FinishReason, HandoffId, Outcome, RequestId, Role
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.engine import PAGE_BYTES, small_config
from kvist.testing.specs import make_peer, submit_decode
from kvist.wire import Abort, Ack, Closed, Done, Grant, Revoke, Submit
from tests.scheduler.handoff_bench import FIRST, PROMPT, Bench, D, H, P, ends, messages


def decode_arrived(request_id: str = "r", handoff_id: HandoffId = H, **fields: Any) -> Submit:
    request = sim_request(request_id, PROMPT, ignore_eos=True, **fields)
    return submit_decode(request, handoff_id=handoff_id, prefill=make_peer(P, endpoint="tcp://p"))


def done(**fields: Any) -> Done:
    message = Done(
        handoff_id=H, target_epoch=D, source_epoch=P, num_pages=3, checksum="sum", first_token=FIRST, transport="sim"
    )
    return msgspec.structs.replace(message, **fields)


def closed(source_epoch: EpochId = P, code: str | None = "overloaded") -> Closed:
    return Closed(handoff_id=H, target_epoch=D, source_epoch=source_epoch, error_code=code, message="no")


VERIFIED = PagesVerified(handoff_id=H, checksum="sum")


def granted(**config: Any) -> Bench:
    bench = Bench(Role.DECODE, **config)
    bench.step(decode_arrived())
    return bench


def verifying(**config: Any) -> Bench:
    bench = granted(**config)
    bench.step(done())
    return bench


def test_decode_grants_pages_for_the_uncached_part_of_the_prompt() -> None:
    bench = granted()
    (sent,) = bench.plan.messages
    assert isinstance(sent, ToSource)
    assert sent.endpoint == "tcp://p"
    assert isinstance(sent.message, Grant)
    assert (sent.message.first_page, len(sent.message.page_ids)) == (0, 3)
    assert (sent.message.target_epoch, sent.message.source_epoch) == (D, P)
    assert bench.plan.watched_epochs == {P}
    assert bench.scheduler.status().pages.in_flight == 3
    assert bench.plan.batch is None


def test_a_second_request_grants_only_uncached_pages() -> None:
    bench = verifying()
    bench.step(VERIFIED)
    bench.step(Abort(request_id=RequestId("r")))
    bench.finish()
    plan = bench.step(decode_arrived("again", HandoffId("h2")))
    (message,) = messages(plan)
    assert isinstance(message, Grant)
    assert (message.first_page, len(message.page_ids)) == (2, 1)


def test_decode_verifies_the_pages_before_it_answers_done() -> None:
    bench = granted()
    (grant_message,) = messages(bench.plan)
    assert isinstance(grant_message, Grant)
    plan = bench.step(done())
    verify = VerifyPages(handoff_id=H, page_ids=grant_message.page_ids, transport="sim", checksum="sum")
    assert plan.transfers == (verify,)
    assert not plan.messages
    assert plan.batch is None


def test_verified_pages_are_acknowledged_cached_and_used() -> None:
    bench = granted()
    bench.now_s = 2.0
    bench.step(done())
    bench.now_s = 2.5
    plan = bench.step(VERIFIED)
    assert messages(plan) == [Ack(handoff_id=H, target_epoch=D)]
    (event,) = plan.changed_pages
    assert (event.tier, len(event.stored)) == ("device", 2)
    assert plan.batch is not None
    (item,) = plan.batch.items
    assert (item.start, list(item.token_ids), item.end) == (10, [5], 11)
    assert not plan.chunks  # prefill has sent position 0
    (chunk,) = bench.finish(token_id=6).chunks
    assert (chunk.position, chunk.token_ids, chunk.num_cached_tokens) == (1, (6,), None)
    assert chunk.handoff is not None
    assert msgspec.structs.astuple(chunk.handoff) == (3, 0, 3 * PAGE_BYTES, 2.5, 0.5, "sim", "", 0, 0, 0, 0, 0, 0)
    assert bench.finish(token_id=6).chunks[0].handoff is None


def test_the_report_has_the_parts_of_the_time_to_the_second_token() -> None:
    bench = granted()
    bench.now_s = 2.0
    bench.step(done(grant_wait_s=0.25, last_copy_s=0.125))
    bench.now_s = 2.5
    assert bench.step(VERIFIED).batch is not None, "decode starts in the step after the verification"
    bench.now_s = 3.25
    (chunk,) = bench.finish(token_id=6).chunks
    report = chunk.handoff
    assert report is not None
    parts = report.grant_wait_s, report.last_copy_s, report.wait_s, report.admission_s, report.first_step_s
    assert parts == (0.25, 0.125, 0.5, 0.0, 0.75)
    totals = bench.scheduler.status().totals
    assert [totals[f"handoff_{part}_seconds"] for part in ("verify", "admission", "first_step")] == [0.5, 0.0, 0.75]


def test_a_repeated_done_is_verified_once_and_acknowledged_each_time() -> None:
    bench = verifying()
    assert not bench.step(done()).transfers
    bench.step(VERIFIED)
    assert messages(bench.step(done())) == [Ack(handoff_id=H, target_epoch=D)]
    assert messages(bench.step(done())) == [Ack(handoff_id=H, target_epoch=D)]


def test_done_with_a_finish_reason_ends_the_request_without_a_chunk() -> None:
    bench = granted()
    bench.step(done(finish_reason=FinishReason.STOP))
    plan = bench.step(VERIFIED)
    assert ends(plan) == [(Outcome.FINISHED, None)]
    assert messages(plan) == [Ack(handoff_id=H, target_epoch=D)]
    assert not plan.chunks
    assert bench.scheduler.status().pages.cached == 2
    assert bench.busy_pages == 0


@pytest.mark.parametrize("damage", ["checksum", "count"])
def test_pages_that_arrived_changed_are_computed_again_and_never_cached_as_they_came(damage: str) -> None:
    bench = granted()
    if damage == "count":
        plan = bench.step(done(num_pages=2))
    else:
        bench.step(done())
        plan = bench.step(PagesVerified(handoff_id=H, checksum="other"))
    assert messages(plan) == [Ack(handoff_id=H, target_epoch=D)]
    assert plan.batch is not None
    assert not plan.changed_pages
    (item,) = plan.batch.items
    assert (item.start, list(item.token_ids)) == (0, PROMPT[:6]), "the first chunk of the prompt"
    plan = bench.finish()
    assert plan.batch is not None
    (item,) = plan.batch.items
    assert (list(item.token_ids), item.samples) == ([*PROMPT[6:], FIRST.token_id], True)
    (chunk,) = bench.finish(token_id=6).chunks
    assert (chunk.position, chunk.token_ids) == (1, (6,))
    assert chunk.handoff is not None
    assert chunk.handoff.num_pages_recomputed == 3
    totals = bench.scheduler.status().totals
    assert (totals["handoff_checksum_mismatches"], totals["handoffs_received"]) == (1, 0)
    assert messages(bench.step(done())) == [Ack(handoff_id=H, target_epoch=D)]


def test_only_the_pages_from_the_first_changed_one_on_are_computed_again() -> None:
    bench = granted()
    plan = bench.step(done(page_digests=b"3 digests"))
    assert [job.page_digests for job in plan.transfers if isinstance(job, VerifyPages)] == [b"3 digests"]
    plan = bench.step(PagesVerified(handoff_id=H, checksum="other", num_intact=2))
    (event,) = plan.changed_pages
    assert len(event.stored) == 2
    assert plan.batch is not None
    (item,) = plan.batch.items
    assert (item.start, list(item.token_ids), item.samples) == (8, [*PROMPT[8:], FIRST.token_id], True)
    assert bench.scheduler.status().totals["handoff_checksum_mismatches"] == 1


def test_a_changed_page_of_an_ended_answer_is_not_cached() -> None:
    bench = granted()
    bench.step(done(finish_reason=FinishReason.STOP))
    plan = bench.step(PagesVerified(handoff_id=H, checksum="other", num_intact=1))
    assert ends(plan) == [(Outcome.FINISHED, None)]
    assert bench.scheduler.status().pages.cached == 1
    assert bench.busy_pages == 0


def test_closed_fails_the_request_with_prefills_reason_and_frees_the_pages() -> None:
    bench = granted()
    assert ends(bench.step(closed())) == [(Outcome.FAILED, "overloaded")]
    assert bench.scheduler.status().pages.free == 12


@pytest.mark.parametrize("waited_s", [0.0, 8.0])  # 8 s: Grant was repeated, and its next repetition is 4 s or more away
def test_an_abort_after_the_grant_keeps_the_pages_in_flight_until_closed_arrives(waited_s: float) -> None:
    bench = granted()
    while bench.now_s < waited_s:
        bench.now_s += 0.5
        bench.step()
    plan = bench.step(Abort(request_id=RequestId("r")))
    assert ends(plan) == [(Outcome.ABORTED, None)]
    assert isinstance(messages(plan)[0], Revoke)
    assert bench.scheduler.status().pages.in_flight == 3
    for _ in range(2):
        bench.now_s += 1.0
        assert isinstance(messages(bench.step())[0], Revoke)
    bench.step(closed(code=None))
    assert bench.scheduler.status().pages.free == 12
    assert not bench.scheduler.has_work()


@pytest.mark.parametrize("first", ["abort", "closed"])
def test_a_handoff_whose_client_has_left_is_cancelled_at_decode_and_not_failed(first: str) -> None:
    bench = granted()
    plan = bench.step(Abort(request_id=RequestId("r")) if first == "abort" else closed(code=None))
    assert ends(plan) == [(Outcome.ABORTED, None)]
    if first == "abort":
        (revoke,) = messages(plan)
        assert isinstance(revoke, Revoke)
        assert revoke.cancelled
        bench.step(closed(code=None))
    totals = bench.scheduler.status().totals
    assert (totals["handoffs_cancelled"], totals["handoffs_failed"]) == (1, 0)
    assert (totals["requests_aborted"], totals["requests_failed"]) == (1, 0)


def test_done_after_revoke_frees_the_granted_pages() -> None:
    bench = granted()
    bench.step(Abort(request_id=RequestId("r")))
    plan = bench.step(done())
    assert bench.scheduler.status().pages.free == 12
    assert not plan.ended
    assert isinstance(messages(bench.step(done()))[0], Revoke)


def test_waiting_for_done_is_bounded_but_the_pages_stay_in_flight() -> None:
    bench = granted(handoff_timeout_s=5.0)
    bench.now_s = 5.0
    plan = bench.step()
    assert ends(plan) == [(Outcome.FAILED, "handoff_failed")]
    assert bench.scheduler.status().pages.in_flight == 3
    bench.step(PeerDied(epoch=P))
    assert bench.scheduler.status().pages.free == 12


def test_the_death_of_prefill_before_done_fails_the_request_and_frees_its_pages() -> None:
    bench = granted()
    assert ends(bench.step(PeerDied(epoch=P))) == [(Outcome.FAILED, "worker_lost")]
    assert bench.scheduler.status().pages.free == 12


def test_the_death_of_prefill_after_done_does_not_affect_the_request() -> None:
    bench = verifying()
    assert not bench.step(PeerDied(epoch=P)).ended
    assert bench.step(VERIFIED).batch is not None


def test_closed_from_another_epoch_fails_the_request_but_does_not_free_its_pages() -> None:
    bench = granted()
    plan = bench.step(closed(source_epoch=EpochId("P#2")))
    assert ends(plan) == [(Outcome.FAILED, "worker_lost")]
    assert bench.scheduler.status().pages.in_flight == 3
    bench.step(closed(source_epoch=EpochId("P#2")))
    assert bench.scheduler.status().pages.in_flight == 3
    bench.step(PeerDied(epoch=P))
    assert bench.scheduler.status().pages.free == 12


@pytest.mark.parametrize("fields", [{"source_epoch": EpochId("P#0")}, {"target_epoch": EpochId("D#0")}])
def test_a_done_from_another_epoch_is_ignored(fields: dict[str, EpochId]) -> None:
    bench = granted()
    plan = bench.step(done(**fields))
    assert not plan.transfers
    assert not plan.messages


def test_a_done_for_an_unknown_handoff_is_answered_with_revoke() -> None:
    bench = granted()
    (message,) = messages(bench.step(done(handoff_id=HandoffId("ghost"))))
    assert isinstance(message, Revoke)


@pytest.mark.parametrize("checksum", ["sum", "other"])
def test_an_abort_while_verifying_sends_revoke_and_frees_the_pages_once_they_are_verified(checksum: str) -> None:
    bench = verifying()
    plan = bench.step(Abort(request_id=RequestId("r")))
    assert ends(plan) == [(Outcome.ABORTED, None)]
    assert isinstance(messages(plan)[0], Revoke)
    assert bench.scheduler.status().pages.in_flight == 3, "the transport may be writing pages that it verifies"
    plan = bench.step(done(), PeerDied(epoch=P))
    assert not plan.messages
    assert bench.scheduler.status().pages.in_flight == 3
    plan = bench.step(PagesVerified(handoff_id=H, checksum=checksum))
    assert not plan.ended
    assert not plan.messages
    assert bench.scheduler.status().pages.free == 12
    assert isinstance(messages(bench.step(done()))[0], Revoke)  # the Revoke was lost, and is repeated
    totals = bench.scheduler.status().totals
    assert (totals["handoffs_cancelled"], totals["handoff_checksum_mismatches"]) == (1, 0)


def test_decode_recomputes_a_preempted_stream_without_a_second_handoff() -> None:
    world = SimCluster()
    config = small_config(max_model_len=24)
    prefill = world.start("p", role=Role.PREFILL, config=config, num_pages=12)
    decode = world.start("d", role=Role.DECODE, config=config, num_pages=6)
    for index in range(3):
        request = sim_request(f"r{index}", [index] * 5, max_tokens=14, ignore_eos=True, seed=index)
        world.submit_pair(request, prefill, decode)
    world.settle()
    world.check_settled()
    totals = decode.scheduler.status().totals
    assert totals["preemptions"] >= 1
    assert totals["computed_prompt_tokens"] > 0
    assert totals["handoffs_received"] == totals["requests_finished"] == 3


def test_decode_keeps_a_page_for_each_running_stream_before_it_grants() -> None:
    bench = Bench(Role.DECODE, num_pages=4, max_model_len=16)
    bench.step(decode_arrived())
    bench.step(done(), VERIFIED)
    plan = bench.step(VERIFIED, decode_arrived("next", HandoffId("h2")))
    assert not [message for message in messages(plan) if isinstance(message, Grant)]
    assert bench.scheduler.status().num_waiting == 1
