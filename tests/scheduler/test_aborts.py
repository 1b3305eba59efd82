"""An abort at every moment of a busy pair: all sides release the request within 100 ms of simulated time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvist.kv.tiers.prefetch import PrefetchConfig
from kvist.request import PRIORITY, Constraint, Mode, Outcome, Role
from kvist.scheduler.active import RequestState
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.engine import SimEngine, small_config
from kvist.simulation.store import SimStore
from tests.budget import budget

WITHIN_S, ROUND_S = 0.1, 0.005  # a round: every message arrives, each engine ends a step and begins another
NUM_PAIRS, NUM_WHOLE, AT_DECODE = 7, 3, (0, 1)
CONFIG = small_config(max_running_requests=3, max_queued_requests=20, max_model_len=24)
# Decode grants pages in another order than prefill computes prompts, so ungranted prompts lose their pages.
LAST_FIRST = replace(CONFIG, max_running_requests=2, scheduling_policy=PRIORITY)
PREFETCH = PrefetchConfig(policy="wait_complete", threshold_tokens=1)


class Busy:
    """A pair and a unified engine with few pages, whose prompts are partly in the host tier and in the store."""

    def __init__(self) -> None:
        world = self.world = SimCluster()
        self.prefill = world.start(
            "p", role=Role.PREFILL, config=CONFIG, num_pages=7, num_host_pages=30, prefetch=PREFETCH
        )
        self.decode = world.start(
            "d", role=Role.DECODE, config=LAST_FIRST, num_pages=8, num_host_pages=30, prefetch=PREFETCH
        )
        self.unified = world.start("u", config=CONFIG, num_pages=8, num_host_pages=30, prefetch=PREFETCH)
        self.engines = (self.prefill, self.decode, self.unified)
        for index, engine in enumerate(self.engines[1:]):
            world.submit(sim_request(f"first{index}", [1] * 9, max_tokens=1), engine)
        world.settle()
        for engine in self.engines:
            world.forget(engine, host=engine is not self.unified)
        self.names = [f"r{number}" for number in range(NUM_PAIRS + NUM_WHOLE)]
        for number, name in enumerate(self.names):
            prompt = [1] * 9 if number % 2 else [number + 2] * 7
            request = sim_request(
                name,
                prompt,
                max_tokens=8,
                ignore_eos=True,
                seed=number,
                constraint=None if number % 4 else Constraint(kind="regex"),
                priority=-99 if number in AT_DECODE else -number,
            )
            if number in AT_DECODE:
                world.submit(request, self.decode)  # takes the places there at first
            elif number < NUM_PAIRS:
                world.submit_pair(request, self.prefill, self.decode)
            else:
                world.submit(request, self.unified)

    def moments(self) -> Iterator[None]:
        """Do one small thing after another until no work is left."""
        world = self.world
        while not world.quiet():
            for wire in sorted(world.wires.waiting()):
                world.deliver(wire)
                yield
            for engine in self.engines:
                for advance in (engine.mover.advance, self._store(engine).advance, engine.transport.advance):
                    advance()
                    yield
                engine.finish_step()
                yield
                engine.step()
                yield
            world.now_s += ROUND_S

    @staticmethod
    def _store(engine: SimEngine) -> SimStore:
        assert engine.store is not None
        return engine.store

    def states(self) -> set[tuple[Mode, RequestState]]:
        live = [request for engine in self.engines for request in engine.scheduler.requests.live.values()]
        return {(request.mode, request.state) for request in live}


def test_an_abort_at_any_moment_releases_everything_at_every_side_within_100_ms() -> None:
    undisturbed = Busy()
    states_at = [undisturbed.states() for _ in undisturbed.moments()]
    undisturbed.world.check_settled()
    first_of = {each: moment for moment, states in reversed([*enumerate(states_at)]) for each in states}
    assert {state for _, state in first_of} == set(RequestState) - {RequestState.ENDED}, "a state that is not tested"
    assert {mode for mode, _ in first_of} == set(Mode)
    for moment in sorted({*first_of.values(), *range(0, len(states_at), budget(30, long=1))}):
        busy = Busy()
        for number, _ in enumerate(busy.moments()):
            if number == moment:
                break
        assert busy.states() == states_at[moment]
        began_s = busy.world.now_s
        for name in busy.names:
            busy.world.abort(name)
        busy.world.settle(max_rounds=int(WITHIN_S / ROUND_S), dt_s=ROUND_S)
        assert busy.world.now_s - began_s <= WITHIN_S + 1e-9
        busy.world.check_settled()
        for engine in busy.engines:
            status = engine.scheduler.status()
            assert (status.pages.in_flight, status.pages.owned, status.num_running, status.num_waiting) == (0, 0, 0, 0)


@pytest.mark.parametrize("then", ["the answer comes", "prefill dies"])
def test_pages_named_by_an_open_write_wait_for_the_answer_of_prefill_or_for_its_epoch(then: str) -> None:
    world = SimCluster()
    prefill = world.start("p", role=Role.PREFILL, num_pages=12)
    decode = world.start("d", role=Role.DECODE, num_pages=12)
    world.submit_pair(sim_request("r", range(10), max_tokens=4), prefill, decode)
    for name in ("p", "d"):
        world.deliver(("gateway", name))
    decode.step()
    world.deliver((decode.epoch, "p"))  # the Grant
    prefill.step()
    prefill.finish_step()
    prefill.step()
    prefill.transport.advance()  # one of its pages is written, and others are not
    world.abort("r")
    world.deliver(("gateway", "d"))
    decode.step()
    assert world.outcome("r", decode) is Outcome.ABORTED, "the client's side ends at once"
    for _ in range(20):
        world.now_s += 0.5
        decode.step()
        assert decode.scheduler.status().pages.in_flight == 3, "prefill may still write the pages"
    if then == "prefill dies":
        world.kill(prefill)
        decode.step()
        assert decode.scheduler.status().pages.in_flight == 0
    began_s = world.now_s
    world.settle(dt_s=ROUND_S)
    assert world.now_s - began_s <= WITHIN_S
    world.check_settled()
    assert decode.scheduler.status().pages.in_flight == 0
