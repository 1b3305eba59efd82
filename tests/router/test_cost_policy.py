"""The policy `cost`: milliseconds of each route, and one worker or two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvist.flight.handoff_report import HandoffReport
from kvist.page_index.page_runs import HeldPages
from kvist.request import Role, WorkerId
from kvist.router.coming_pages import ComingPages
from kvist.router.policies.cost import OTHERS, Cost, alone_ms, decode_ms, handoff_ms, prefill_ms
from kvist.router.policy import FleetView, Path, Prompt, Reason, WorkerView
from kvist.router.rates import RateMeter, Rates
from kvist.testing.specs import make_request

PROMPT = Prompt(num_tokens=3200)  # 200 pages
RATES = Rates(prompt_tokens_per_s=16_000, host_bytes_per_s=1e9, handoff_bytes_per_s=1e9)  # 1 ms a page, all three
FAST_LINK = replace(RATES, handoff_bytes_per_s=1e12)
SLOW = replace(RATES, prompt_tokens_per_s=4_000)


def view(name: str, role: Role = Role.UNIFIED, **fields: Any) -> WorkerView:
    return WorkerView(
        worker_id=WorkerId(name),
        page_size=16,
        role=role,
        **{
            "num_requests": 0,
            "num_pending_tokens": 0,
            "num_known_pages": 0,
            "page_bytes": 1_000_000,
            "max_running_requests": 100,
            "rates": RATES,
            **fields,
        },
    )


def choose(*workers: WorkerView, prompt: Prompt = PROMPT, also_alone: bool = True, short: bool = False) -> Path:
    by_role = {role: [worker for worker in workers if worker.role is role] for role in Role}
    pairs = bool(by_role[Role.PREFILL]) and bool(by_role[Role.DECODE])
    spare = [*by_role[Role.DECODE], *(by_role[Role.PREFILL] if short else ())]
    return Cost().choose(
        prompt,
        FleetView(
            alone=by_role[Role.UNIFIED],
            prefill=by_role[Role.PREFILL] if pairs else (),
            decode=by_role[Role.DECODE] if pairs else (),
            also_alone=spare if also_alone else (),
        ),
    )


def test_costs_are_milliseconds_at_the_measured_rates() -> None:
    assert prefill_ms(PROMPT, view("a")) == pytest.approx(200)
    assert prefill_ms(PROMPT, view("a", num_pending_tokens=1600)) == pytest.approx(300)
    assert prefill_ms(PROMPT, view("a", held=HeldPages(150, 0))) == pytest.approx(50)
    assert prefill_ms(PROMPT, view("a", held=HeldPages(100, 50))) == pytest.approx(50 + 50), "50 pages are loaded"
    assert handoff_ms(PROMPT, view("d", held=HeldPages(150, 0))) == pytest.approx(50)
    assert decode_ms(PROMPT, view("d", num_requests=10, service_s=2.0)) == pytest.approx(200)
    assert decode_ms(PROMPT, view("d", num_available_pages=100)) == pytest.approx(100), "100 pages must be freed"


def test_computed_tokens_take_time_from_the_next_requests_and_from_the_streams() -> None:
    assert alone_ms(PROMPT, view("a", num_requests=50)) == pytest.approx(200 + 200 * (OTHERS + 0.5))


def test_affinity_and_load_are_weighed_and_neither_switches_the_other_off() -> None:
    holder = view("a", held=HeldPages(190, 0))
    assert choose(holder, view("b")).prefill.worker_id == "a"
    waiting = view("a", held=HeldPages(190, 0), num_pending_tokens=2400)
    assert choose(waiting, view("b")).prefill.worker_id == "a"
    overloaded = view("a", held=HeldPages(190, 0), num_pending_tokens=14_000)
    assert choose(overloaded, view("b")).prefill.worker_id == "b"


def test_a_pair_is_chosen_when_decode_would_take_longer() -> None:
    slow = Rates(prompt_tokens_per_s=4_000, handoff_bytes_per_s=1e10)
    assert choose(view("p", Role.PREFILL), view("d", Role.DECODE, rates=slow)).reason is Reason.SPLIT


@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        ([view("p", Role.PREFILL), view("d", Role.DECODE, held=HeldPages(199, 0))], Reason.HELD),
        ([view("p", Role.PREFILL, num_pending_tokens=9000), view("d", Role.DECODE)], Reason.HELD),
        ([view("p", Role.PREFILL), view("d", Role.DECODE, rates=FAST_LINK)], Reason.CHEAPER),
        (
            [view("p", Role.PREFILL, rates=SLOW, num_pending_tokens=9000), view("d", Role.DECODE, rates=FAST_LINK)],
            Reason.CHEAPER,
        ),
        ([view("d", Role.DECODE)], Reason.NO_PREFILL),
        ([view("u")], Reason.UNIFIED),
    ],
)
def test_decode_computes_the_prompt_itself_where_that_is_cheaper(workers: list[WorkerView], reason: Reason) -> None:
    path = choose(*workers)
    assert path.is_alone
    assert path.reason is reason
    assert path.cost_ms is not None


def test_a_long_queue_at_prefill_is_named_as_the_reason() -> None:
    slow_decode = replace(FAST_LINK, prompt_tokens_per_s=8_000)
    assert choose(view("p", Role.PREFILL), view("d", Role.DECODE, rates=slow_decode)).reason is Reason.SPLIT
    busy = view("p", Role.PREFILL, num_pending_tokens=90_000)
    path = choose(busy, view("d", Role.DECODE, rates=slow_decode))
    assert (path.is_alone, path.reason) == (True, Reason.PREFILL_QUEUE)


def test_prefill_finishes_a_short_answer() -> None:
    path = choose(view("p", Role.PREFILL), view("d", Role.DECODE, num_requests=9), short=True)
    assert (path.worker_ids, path.reason) == (("p", "p"), Reason.SHORT_ANSWER)


def test_rates_follow_the_counters_within_bounds() -> None:
    meter = RateMeter()
    for step in range(1, 40):
        meter.on_totals({"prompt_step_tokens": 1000.0 * step, "prompt_step_seconds": 0.1 * step})
    assert meter.rates.prompt_tokens_per_s == pytest.approx(10_000, rel=0.01)
    before = meter.rates
    meter.on_totals({"prompt_step_tokens": 5.0, "prompt_step_seconds": 0.1})
    assert meter.rates == before, "counters that fell are a restart, and change nothing"
    meter.on_totals({"prompt_step_tokens": 1e30, "prompt_step_seconds": 0.2})
    assert meter.rates.prompt_tokens_per_s == 1e7
    meter.on_handoff(HandoffReport(num_pages=1, num_pages_reused=0, num_bytes=10**9, duration_s=1.0, wait_s=0.1))
    assert 1e9 < meter.rates.handoff_bytes_per_s < 1e10


def test_coming_pages_are_those_of_requests_under_way() -> None:
    coming = ComingPages()
    first, second = (make_request(name, tuple(range(2000)), max_tokens=1) for name in ("a", "b"))
    coming.add(first.request_id, first.prompt_token_ids, "")
    assert coming.num_common_tokens((*range(1500), 7, *range(9)), "") == 1500
    assert coming.num_common_tokens(second.prompt_token_ids, "salt") == 0
    coming.add(second.request_id, second.prompt_token_ids, "")
    coming.remove(first.request_id)
    assert coming.num_common_tokens(tuple(range(2000)), "") == 2000
    coming.remove(second.request_id)
    assert (coming.num_common_tokens(tuple(range(2000)), ""), len(coming)) == (0, 0)


def test_stored_pages_are_loaded_at_the_measured_rate_of_the_store() -> None:
    rates = Rates(prompt_tokens_per_s=16_000, host_bytes_per_s=1e9, store_bytes_per_s=2e8)
    assert prefill_ms(PROMPT, view("a", held=HeldPages(100, 0, 50), rates=rates)) == pytest.approx(50 + 50 * 5)
    assert prefill_ms(PROMPT, view("a", held=HeldPages(0, 40, 10), rates=rates)) == pytest.approx(40 + 50 + 150)
    coming = view("a", held=HeldPages(0, 0, 50), num_coming_tokens=40 * 16, rates=rates)
    assert prefill_ms(PROMPT, coming) == pytest.approx(150 + 10 * 5), "40 of them are computed there anyway"


def test_a_worker_with_a_fast_store_is_chosen_over_one_that_computes() -> None:
    fast, slow = replace(RATES, store_bytes_per_s=1e10), replace(RATES, store_bytes_per_s=1e7)
    stored = HeldPages(0, 0, 150)
    assert choose(view("a"), view("b", held=stored, rates=fast)).prefill.worker_id == "b"
    assert choose(view("a"), view("b", held=stored, rates=slow)).prefill.worker_id == "a"


def test_streams_cost_what_a_mean_answer_takes_in_decode_steps() -> None:
    meter = RateMeter()
    assert meter.rates.decode_s is None
    for second in range(1, 200):
        totals = {
            "decode_steps": 20.0,
            "decode_step_seconds": 0.5,
            "generation_tokens": 400.0,
            "requests_finished": 2.0,
        }
        meter.on_totals({name: each * second for name, each in totals.items()})
    assert meter.rates.decode_s == pytest.approx(200 / 40, rel=0.01)
    slow = view("d", num_requests=10, service_s=9.0, rates=meter.rates)
    assert decode_ms(PROMPT, slow) == pytest.approx(500, rel=0.01)
