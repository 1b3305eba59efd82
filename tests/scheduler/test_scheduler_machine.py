"""One engine, any order of events: every request ends once, with the tokens of an undisturbed engine."""

from __future__ import annotations

from typing import Literal

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvist.kv.tiers.prefetch import PREFETCH_POLICIES, PrefetchConfig
from kvist.kv.tiers.write_policy import WRITE_POLICIES
from kvist.lease_messages import LeaseCommand
from kvist.plan.tiers import StorageAttached
from kvist.request import FCFS, PRIORITY, Constraint, LeaseTerms, Role
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.engine import small_config
from kvist.simulation.store import SimStore
from kvist.wire import FlushCache
from tests.budget import budget

TOKENS = st.integers(0, 3)  # few different tokens: many shared prefixes
ONE_OF_FEW = st.builds(lambda token_id, length: [token_id] * length, st.integers(0, 2), st.integers(5, 20))


class OneEngine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = SimCluster()
        self.count = 0

    @initialize(
        num_pages=st.integers(3, 12),
        running=st.integers(1, 4),
        chunk=st.integers(1, 9),
        overlap=st.booleans(),
        num_host_pages=st.sampled_from([0, 2, 6, 30]),
        write_policy=st.sampled_from(sorted(WRITE_POLICIES)),
        prefetch=st.sampled_from([None, *PREFETCH_POLICIES]),
        fetch_pages=st.sampled_from([1, 2, 16]),
        row_tokens=st.sampled_from([1, 1, 2, 5]),
        policy=st.sampled_from([FCFS, PRIORITY]),
        leased=st.sampled_from([0.0, 0.3, 0.9]),
    )
    def start(
        self,
        num_pages: int,
        running: int,
        chunk: int,
        overlap: bool,
        num_host_pages: int,
        write_policy: str,
        prefetch: str | None,
        fetch_pages: int,
        row_tokens: int,
        policy: str,
        leased: float,
    ) -> None:
        config = small_config(
            max_running_requests=running,
            chunked_prefill_size=chunk,
            overlap=overlap,
            scheduling_policy=policy,
            max_lease_fraction=leased,
            max_lease_fraction_per_key=0.6,
        )
        self.engine = self.world.start(
            "u",
            role=Role.UNIFIED,
            config=config,
            num_pages=num_pages,
            num_host_pages=num_host_pages,
            write_policy=write_policy,
            prefetch=None if prefetch is None else PrefetchConfig(policy=prefetch, threshold_tokens=1),
            fetch_pages=fetch_pages,
            row_tokens=row_tokens,
        )

    @rule(
        prompt=st.one_of(st.lists(TOKENS, max_size=20), ONE_OF_FEW, ONE_OF_FEW),
        max_tokens=st.integers(1, 12),
        min_tokens=st.integers(0, 4),
        ignore_eos=st.booleans(),
        stops=st.sampled_from([(), (3,), (3, 11, 12)]),
        resumed=st.integers(0, 3),
        salt=st.sampled_from(["", "", "other"]),
        client=st.sampled_from(["k/h/1", "k/h/2", "k/i/3", "l/h/1"]),
        scored_from=st.sampled_from([None, None, 0, 1, 4, 9]),
        priority=st.sampled_from([0, 0, -3, 1, 7]),
        lease_s=st.sampled_from([None, None, None, 0.1, 600.0]),
        shared=st.sampled_from([0, 0, 0, 5, 30]),
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
        client: str = "",
        scored_from: int | None = None,
        priority: int = 0,
        lease_s: float | None = None,
        shared: int = 0,
    ) -> None:
        self.count += 1
        if self.count % 4:  # every fourth request may be too long
            max_tokens = max(0, min(max_tokens, self.engine.context_len - len(prompt)))
        if lease_s is not None:
            max_tokens, resumed = 0, 0
        request = sim_request(
            f"r{self.count}",
            prompt,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            stop_token_ids=stops,
            output_token_ids=tuple(range(13, 13 + resumed)),
            cache_salt=salt,
            client=client,
            priority=priority,
            seed=self.count,
            constraint=None if self.count % 5 else Constraint(kind="regex"),
            prompt_logprobs=None if scored_from is None else 2,
            prompt_logprobs_start=scored_from or 0,
            background=self.count % 7 == 0,
            num_shared_tokens=0 if lease_s is not None else shared,
            lease=None if lease_s is None else LeaseTerms(lease_id=f"l{self.count}", ttl_s=lease_s),
        )
        self.world.submit(request, self.engine)
        self.world.deliver(("gateway", "u"))

    @rule(action=st.sampled_from(["renew", "end", "list"]), which=st.integers(1, 30), owner=st.sampled_from("kl"))
    def command_lease(self, action: Literal["renew", "end", "list"], which: int, owner: str) -> None:
        command = LeaseCommand(call_id="c", action=action, owner=owner, lease_id=f"l{which}", ttl_s=0.2)
        self.engine.events.append(command)

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
    def advance_mover(self, newest: bool) -> None:
        self.engine.mover.advance(newest)

    @rule()
    def fail_next_copy(self) -> None:
        self.engine.mover.fail_next = True

    @property
    def store(self) -> SimStore:
        assert self.engine.store is not None
        return self.engine.store

    @precondition(lambda self: self.engine.store is not None)
    @rule(newest=st.booleans(), times=st.integers(1, 3))
    def advance_store(self, newest: bool, times: int) -> None:
        for _ in range(times):
            self.store.advance(newest)

    @precondition(lambda self: self.engine.store is not None)
    @rule(
        how=st.sampled_from(
            ["fails", "hangs", "returns", "overclaims", "reports correctly", "forgets some", "forgets all"]
        ),
        which=st.integers(0, 9),
    )
    def store_fault(self, how: str, which: int) -> None:
        store, stored = self.store, self.world.stored
        if how == "fails":
            store.fail_next = True
        elif how == "hangs":
            store.hang()
        elif how == "returns":
            store.hung.clear()
        elif how in ("overclaims", "reports correctly"):
            store.overclaims = how == "overclaims"
        else:
            for digest in list(stored)[which::3] if how == "forgets some" else list(stored):
                del stored[digest]

    @precondition(lambda self: self.engine.store is not None)
    @rule(attached=st.sampled_from([True, True, False]))
    def attach_or_detach_store(self, attached: bool) -> None:
        self.engine.events.append(StorageAttached(attached=attached))

    @rule(
        token_id=st.integers(0, 1),
        gone_from=st.sampled_from(["nowhere", "device", "host", "host"]),
        times=st.integers(1, 3),
        fault=st.sampled_from(["", "", "hangs", "fails", "aborts"]),
    )
    def repeat_prompt(self, token_id: int, gone_from: str, times: int, fault: str) -> None:
        """Repeat a prompt whose pages are only in the host tier by now, or in the store."""
        if gone_from != "nowhere":
            self.submit([token_id] * 17, 2, 0, True, (), 0, "")
            self.settle_all()
            self.world.forget(self.engine, host=gone_from == "host")
        for _ in range(times):
            self.submit([token_id] * 17, 2, 0, True, (), 0, "")
        if fault and self.engine.store is not None:  # inject the fault while the pages are fetched
            for _ in range(2):
                self.step(finishes=True)
                self.engine.store.advance()
            self.step(finishes=True)
            if fault == "aborts":
                self.abort(self.count)
            else:
                self.store_fault(fault, 0)

    @rule()
    def settle_all(self) -> None:
        """Run until all requests have ended. Starvation fails here: a few dozen requests of a few dozen tokens need far
        fewer rounds. Time passes only while a store hangs."""
        hangs = self.engine.store is not None and bool(self.engine.store.hung)
        self.world.settle(max_rounds=100 + 400 * hangs + 80 * self.count, dt_s=0.05 if hangs else 0.0)

    @rule(all_tiers=st.sampled_from([False, False, False, True]))
    def evict_cached_pages(self, all_tiers: bool) -> None:
        if all_tiers:
            self.engine.events.append(FlushCache(call_id="f"))
        else:
            self.engine.cache.evict(self.engine.cache.counts().evictable)

    @rule()
    def fail_step(self) -> None:
        self.engine.fail_next_step = bool(self.engine.under_way)

    @rule(by_s=st.sampled_from([0.5, 2.0, 40.0]))
    def time_passes(self, by_s: float) -> None:
        self.world.now_s += by_s

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.settle_all()
            self.world.check_settled()
            if self.engine.store is not None:
                self.engine.store.hung.clear()
                self.settle_all()
                self.world.check_settled()


def test_one_engine_keeps_its_promises_in_any_order_of_events() -> None:
    run_state_machine_as_test(
        OneEngine,
        settings=settings(
            max_examples=budget(60, long=3000), stateful_step_count=40, suppress_health_check=list(HealthCheck)
        ),
    )
