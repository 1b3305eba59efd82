"""How long the queue lasts: the estimate of a scheduler beside the time that it takes, in simulated time."""

from __future__ import annotations

import random

import msgspec
import pytest

from kvist.kv.cache import PageCache
from kvist.plan.batch import Batch
from kvist.plan.events import Event, SampledTokens, StepFinished
from kvist.request import EpochId, RequestId, Role
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.testing.specs import make_peer, make_peer_spec, make_request, submit_decode, submit_full
from kvist.wire import Abort

TOKENS_PER_S, STEP_S = 4000.0, 0.005
NUM_PAGES, NUM_PLACES = 40_000, 64


class Timed:
    """A scheduler whose steps take the time of their tokens. Mutable; owned by one test."""

    def __init__(self, *, num_pages: int = NUM_PAGES, num_places: int = NUM_PLACES, role: Role = Role.UNIFIED) -> None:
        config = SchedulerConfig(
            max_running_requests=num_places,
            max_queued_requests=600,
            chunked_prefill_size=2048,
            max_prefill_tokens=2048,
            max_model_len=30_000,
            queue_timeout_s=1e6,
        )
        cache = PageCache(num_pages=num_pages, page_size=16, namespace="t")
        self.scheduler = build_scheduler(role, config, cache, EpochId("e"), make_peer_spec())
        self.now_s = 0.0
        self._rng, self._num_requests = random.Random(1), 0
        self._batch: Batch | None = None

    def tokens(self, num_tokens: int) -> list[int]:
        return [self._rng.randrange(1000) for _ in range(num_tokens)]

    def submit(self, *prompts: list[int], own: int | None = None, answer: int = 4) -> None:
        """Submit requests, each of which has `own` tokens to compute, but the first all; None: all have all."""
        events: list[Event] = []
        for prompt in prompts:
            self._num_requests += 1
            request = make_request(f"r{self._num_requests}", prompt, max_tokens=answer, ignore_eos=True)
            num_uncomputed = len(prompt) if own is None or not events else own
            events.append(msgspec.structs.replace(submit_full(request), num_uncomputed_tokens=num_uncomputed))
        self._step(events)

    def abort(self, name: str) -> None:
        self._step([Abort(request_id=RequestId(name))])

    def run(self, *, while_queued: bool = False) -> float:
        """Run until no request is left, or none is queued; return the time that this took."""
        begun_s = self.now_s
        while self._batch is not None and (self.num_queued or not while_queued):
            self.run_step()
        return self.now_s - begun_s

    def run_step(self) -> None:
        batch, self._batch = self._batch, None
        assert batch is not None
        self.now_s += STEP_S + batch.num_tokens / TOKENS_PER_S
        token_ids = [7 for item in batch.items if item.samples]
        self._step([StepFinished(step_id=batch.step_id, sampled=SampledTokens(token_ids=token_ids))])

    @property
    def num_queued(self) -> int:
        return len(self.scheduler.requests.unadmitted)

    def estimate_s(self) -> float | None:
        return self.scheduler.status().queue_wait_s

    def _step(self, events: list[Event]) -> None:
        plan = self.scheduler.step(self.now_s, events, with_batch=self._batch is None)
        self._batch = self._batch or plan.batch


def after_prompts(num_tokens: int, *, num_pages: int = NUM_PAGES, num_places: int = NUM_PLACES) -> Timed:
    """Return a scheduler that has computed a queue of distinct prompts."""
    timed = Timed(num_pages=num_pages, num_places=num_places)
    timed.submit(*(timed.tokens(num_tokens) for _ in range(30)))
    timed.run()
    return timed


def test_prompts_with_one_prefix_wait_until_it_is_computed_once() -> None:
    """By the tokens of each request, 49 of them wait for 125 s."""
    timed = after_prompts(2000)
    prefix = timed.tokens(10_000)
    timed.submit(*(prefix + timed.tokens(20) for _ in range(50)), own=20)
    assert timed.num_queued == 49
    estimate_s = timed.estimate_s()
    assert estimate_s == pytest.approx(timed.run(while_queued=True), rel=0.2)
    assert estimate_s == pytest.approx(2.5, rel=0.2)


@pytest.mark.parametrize("num_tokens", [500, 5000])
def test_distinct_prompts_wait_for_all_their_tokens(num_tokens: int) -> None:
    timed = after_prompts(2000)
    timed.submit(*(timed.tokens(num_tokens) for _ in range(40)))
    timed.run_step()
    assert timed.estimate_s() == pytest.approx(timed.run(while_queued=True), rel=0.15)


def test_cached_chats_wait_for_places_and_not_only_for_their_few_tokens() -> None:
    """By their own tokens, 42 of them wait for 0.2 s."""
    timed = after_prompts(10_000, num_places=8)
    prefix = timed.tokens(10_000)
    timed.submit(prefix)
    timed.run()
    for _ in range(3):
        timed.submit(*(prefix + timed.tokens(20) for _ in range(50)), own=20, answer=400)
        timed.run_step()
        queued_s = timed.run(while_queued=True)
        timed.run()
    timed.submit(*(prefix + timed.tokens(20) for _ in range(50)), own=20, answer=400)
    assert timed.num_queued == 42
    assert timed.estimate_s() == pytest.approx(queued_s, rel=0.2)


def test_distinct_prompts_after_cached_chats_wait_for_their_tokens() -> None:
    """By the rate at which tokens of chats left the queue, they wait for 0.1 s."""
    timed = Timed(num_places=8)
    prefix = timed.tokens(10_000)
    timed.submit(*(prefix + timed.tokens(20) for _ in range(50)), own=20, answer=40)
    timed.run()
    timed.submit(*(timed.tokens(5000) for _ in range(8)))
    assert timed.estimate_s() == pytest.approx(timed.run(while_queued=True), rel=0.15)


def test_requests_that_lack_pages_wait_as_long_as_those_before_them() -> None:
    """Places are free, and their tokens alone would take 3 s."""
    timed = after_prompts(10, num_pages=200)  # eight requests of 400 tokens
    for _ in range(2):
        timed.submit(*(timed.tokens(300) for _ in range(60)), answer=100)
        while timed.num_queued > 40:
            timed.run_step()
        estimate_s, queued_s = timed.estimate_s(), timed.run(while_queued=True)
        timed.run()
    assert estimate_s == pytest.approx(queued_s, rel=0.15)
    assert queued_s > 6.0


def test_a_request_behind_a_long_prompt_waits_for_the_rest_of_that_prompt() -> None:
    timed = after_prompts(2000)
    timed.submit(timed.tokens(20_000))
    timed.submit(timed.tokens(50))
    assert timed.num_queued == 1
    timed.run_step()
    assert timed.estimate_s() == pytest.approx(timed.run(while_queued=True), rel=0.2)


def test_a_decode_request_has_no_tokens_to_compute() -> None:
    timed = Timed(role=Role.DECODE)
    for name in ("d1", "d2"):
        submit = submit_decode(make_request(name, [1] * 5000), handoff_id=name, prefill=make_peer("p"))
        timed.scheduler.step(timed.now_s, [submit], with_batch=False)
    assert timed.num_queued == 2
    assert timed.scheduler.requests.unadmitted.num_tokens == 0


def test_the_tokens_of_a_queue_are_those_of_its_requests_in_any_order_of_arrival_and_end() -> None:
    rng = random.Random(5)
    for _ in range(20):
        timed = Timed(num_places=2)
        timed.submit(timed.tokens(2000), timed.tokens(2000))
        waiting = {f"r{number}": rng.randrange(1, 90) for number in range(3, 15)}
        for num_tokens in waiting.values():
            timed.submit(timed.tokens(num_tokens))
        names = [name for name in waiting if rng.random() < 0.7]
        rng.shuffle(names)
        for name in names:
            timed.abort(name)
            del waiting[name]
            assert timed.scheduler.requests.unadmitted.num_tokens == sum(waiting.values())
        timed.run()
        assert timed.scheduler.requests.unadmitted.num_tokens == 0
        assert timed.estimate_s() == 0.0
