"""An engine measures which stage a request is in, and sends the stages with the token after them."""

from __future__ import annotations

from collections.abc import Sequence

from kvist.flight.stages import StageTime
from kvist.plan.transfers import PagesVerified
from kvist.request import Outcome, Role
from kvist.simulation.cluster import sim_request
from kvist.testing.specs import make_peer, submit_decode, submit_full, submit_prefill
from kvist.wire import Done, TokenChunk
from tests.scheduler.handoff_bench import FIRST, PROMPT, Bench, D, H, P


def named(parts: Sequence[StageTime]) -> list[tuple[str, float]]:
    return [(part.stage, round(part.duration_s, 6)) for part in parts]


def chunk(bench: Bench) -> TokenChunk:
    (found,) = bench.plan.chunks
    return found


def finish_at(bench: Bench, now_s: float) -> None:
    bench.now_s = now_s
    bench.finish()


def test_the_first_token_brings_queue_and_prefill_by_chunk_and_later_tokens_bring_nothing() -> None:
    bench = Bench(Role.UNIFIED, chunked_prefill_size=8)
    bench.step(submit_full(sim_request("a", range(8), ignore_eos=True, max_tokens=20)))
    bench.now_s = 1.0
    bench.step(submit_full(sim_request("b", range(20, 32), ignore_eos=True, max_tokens=20)))
    finish_at(bench, 2.0)  # all of a: b gets the rest of the next step
    assert named(chunk(bench).stages) == [("prefill", 2.0)]
    finish_at(bench, 5.0)
    assert [each.stages for each in bench.plan.chunks] == [()]
    finish_at(bench, 6.0)
    [parts] = [each.stages for each in bench.plan.chunks if each.request_id == "b"]
    assert named(parts) == [("queued", 1.0), ("prefill", 3.0), ("prefill", 1.0)]
    assert [part.detail for part in parts[1:]] == ["tokens 0 to 9", "tokens 9 to 12"]
    finish_at(bench, 7.0)
    assert [each.stages for each in bench.plan.chunks] == [(), ()]


def test_a_preempted_request_reports_its_pause_with_the_next_token() -> None:
    bench = Bench(Role.UNIFIED, num_pages=6)
    for number, name in enumerate("ab"):
        prompt = range(number * 9, number * 9 + 8)
        bench.step(submit_full(sim_request(name, prompt, ignore_eos=True, max_tokens=12)))
    parts: list[StageTime] = []
    for now_s in range(1, 40):
        bench.now_s = float(now_s)
        if bench.batch is None:
            break
        bench.finish()
        parts += [part for each in bench.plan.chunks if each.request_id == "b" for part in each.stages]
    assert bench.scheduler.status().totals["preemptions"] >= 1
    names = [part.stage for part in parts]
    place = names.index("preempted")
    assert (names[place - 1], names[place + 1]) == ("decode", "prefill")


def test_the_head_of_the_queue_waits_for_pages() -> None:
    bench = Bench(Role.UNIFIED, num_pages=4)
    bench.step(submit_full(sim_request("a", range(8), ignore_eos=True, max_tokens=3)))
    bench.step(submit_full(sim_request("b", range(20, 32), ignore_eos=True, max_tokens=1)))
    for now_s in range(1, 10):
        finish_at(bench, float(now_s))
        found = [each for each in bench.plan.chunks if each.request_id == "b"]
        if found:
            break
    assert "pages" in [part.stage for part in found[0].stages]
    assert "no page is free" in [part.detail for part in found[0].stages]


def test_decode_reports_how_long_pages_were_written_and_verified() -> None:
    bench = Bench(Role.DECODE)
    request = sim_request("r", PROMPT, ignore_eos=True, max_tokens=20)
    bench.step(submit_decode(request, handoff_id=H, prefill=make_peer(P, endpoint="tcp://p")))
    bench.now_s = 3.0
    bench.step(
        Done(
            handoff_id=H, target_epoch=D, source_epoch=P, num_pages=3, checksum="c", first_token=FIRST, transport="sim"
        )
    )
    bench.now_s = 3.5
    bench.step(PagesVerified(handoff_id=H, checksum="c"))
    finish_at(bench, 4.0)
    parts = chunk(bench).stages
    assert named(parts) == [("handoff", 3.0), ("handoff", 0.5), ("decode", 0.5)]
    assert [part.detail for part in parts[:2]] == ["pages are computed and written", "pages are verified"]


def test_prefill_reports_its_wait_for_the_pages_of_decode() -> None:
    bench = Bench(Role.PREFILL)
    request = sim_request("r", PROMPT, ignore_eos=True, max_tokens=20)
    bench.step(submit_prefill(request, handoff_id=H, target_epoch=D))
    while bench.batch is not None:
        finish_at(bench, bench.now_s + 1.0)
    computed_s = bench.now_s
    assert bench.plan.chunks == ()
    bench.now_s = 200.0  # after --grant-timeout-s
    bench.step()
    (ended,) = bench.plan.ended
    assert ended.outcome is Outcome.FAILED
    assert [part.stage for part in ended.stages] == [*["prefill"] * int(computed_s), "handoff"]
    assert ended.stages[-1].duration_s == 200.0 - computed_s


def test_a_request_that_is_never_started_reports_its_queue() -> None:
    bench = Bench(Role.UNIFIED, max_running_requests=1)
    bench.step(submit_full(sim_request("a", range(8), ignore_eos=True, max_tokens=30)))
    bench.step(submit_full(sim_request("b", range(9, 12), ignore_eos=True, max_tokens=30)))
    bench.now_s = 10_000.0
    bench.step()
    (ended,) = bench.plan.ended
    assert (ended.error_code, named(ended.stages)) == ("timeout", [("queued", 10_000.0)])
