"""One engine, any order of events: every request ends once, with the tokens of an undisturbed run."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from scheduler_sim import World, make_request, small_config

from kvist.kv.cache import WRITE_POLICIES
from kvist.scheduler.events import FlushRequested

TOKENS = st.integers(0, 3)  # few different tokens: many shared prefixes
ONE_OF_FEW = st.builds(lambda token_id, length: [token_id] * length, st.integers(0, 2), st.integers(5, 20))


class OneEngine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.count = 0

    @initialize(
        num_pages=st.integers(3, 12),
        running=st.integers(1, 4),
        chunk=st.integers(1, 9),
        overlap=st.booleans(),
        num_host_pages=st.sampled_from([0, 2, 6, 30]),
        write_policy=st.sampled_from(sorted(WRITE_POLICIES)),
    )
    def start(
        self, num_pages: int, running: int, chunk: int, overlap: bool, num_host_pages: int, write_policy: str
    ) -> None:
        config = small_config(max_running_requests=running, chunked_prefill_size=chunk, overlap=overlap)
        self.engine = self.world.start(
            "u", "unified", config, num_pages=num_pages, num_host_pages=num_host_pages, write_policy=write_policy
        )

    @rule(
        prompt=st.one_of(st.lists(TOKENS, max_size=20), ONE_OF_FEW, ONE_OF_FEW),
        max_tokens=st.integers(1, 12),
        min_tokens=st.integers(0, 4),
        ignore_eos=st.booleans(),
        stops=st.sampled_from([(), (3,), (3, 11, 12)]),
        resumed=st.integers(0, 3),
        salt=st.sampled_from(["", "", "other"]),
    )
    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        min_tokens: int,
        ignore_eos: bool,
        stops: tuple[int, ...],
        resumed: int,
        salt: str,
    ) -> None:
        self.count += 1
        request = make_request(
            f"r{self.count}",
            prompt,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            stop_token_ids=stops,
            outputs=tuple(range(13, 13 + resumed)),
            cache_salt=salt,
            seed=self.count,
        )
        self.world.submit(request, self.engine)
        self.world.deliver(("gateway", "u"))

    @rule(which=st.integers(1, 30))
    def abort(self, which: int) -> None:
        if f"r{which}" in self.world.submitted:
            self.world.abort(f"r{which}")
            self.world.deliver(("gateway", "u"))

    @rule(finishes=st.booleans())
    def step(self, finishes: bool) -> None:
        if finishes:
            self.engine.finish_step()
        self.engine.step()
        self.world.now_s += 0.01

    @rule(newest=st.booleans())
    def pages_move(self, newest: bool) -> None:
        self.engine.mover.advance(newest)

    @rule()
    def move_fails(self) -> None:
        self.engine.mover.fail_next = True

    @rule(token_id=st.integers(0, 1), drops=st.booleans())
    def ask_again(self, token_id: int, drops: bool) -> None:
        """What was cached may be in the host tier only by now."""
        if drops:
            self.all_get_done()
            self.cached_pages_go(all_tiers=False)
        self.submit([token_id] * 17, 2, 0, True, (), 0, "")

    @rule()
    def all_get_done(self) -> None:
        self.world.settle(max_rounds=100 + 80 * self.count, dt_s=0.0)

    @rule(all_tiers=st.sampled_from([False, False, False, True]))
    def cached_pages_go(self, all_tiers: bool) -> None:
        if all_tiers:
            self.engine.events.append(FlushRequested(call_id="f"))
        else:
            self.engine.cache._evict(self.engine.cache.counts().evictable)

    @rule()
    def step_fails(self) -> None:
        self.engine.fail_next_step = bool(self.engine.under_way)

    @rule(by_s=st.sampled_from([0.5, 40.0]))
    def time_passes(self, by_s: float) -> None:
        self.world.now_s += by_s

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            # starvation would show here: a few dozen requests of a few dozen tokens need far fewer rounds
            self.world.settle(max_rounds=100 + 80 * self.count, dt_s=0.0)
            self.world.check_settled()


def test_one_engine_keeps_its_promises_in_any_order_of_events() -> None:
    run_state_machine_as_test(
        OneEngine,
        settings=settings(
            max_examples=160, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
