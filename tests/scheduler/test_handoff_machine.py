"""Two prefill and two decode engines over a wire that delays, reorders, duplicates and loses whole processes."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from kvist.kv.tiers.prefetch import PREFETCH_POLICIES, PrefetchConfig
from kvist.kv.tiers.write_policy import WRITE_POLICIES
from kvist.request import FCFS, PRIORITY, Constraint, Role
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.engine import SimEngine, small_config
from tests.budget import budget

PREFILLS = ("p0", "p1")
DECODES = ("d0", "d1")
NAMES = st.sampled_from(PREFILLS + DECODES)
PROMPTS = st.one_of(
    st.lists(st.integers(0, 2), min_size=1, max_size=18),
    st.builds(
        lambda token_id, length: [token_id] * length, st.integers(0, 1), st.integers(5, 18)
    ),  # one of a few prompts
)


class Cluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = SimCluster()
        self.count = 0
        self.gateway_aborts = False

    @initialize(
        prefill_pages=st.integers(6, 14),
        decode_pages=st.integers(6, 14),
        unified=st.booleans(),
        gateway_aborts=st.booleans(),
        remembered=st.sampled_from([1, 64]),
        overlap=st.booleans(),
        num_host_pages=st.sampled_from([0, 4, 30]),
        write_policy=st.sampled_from(sorted(WRITE_POLICIES)),
        policy=st.sampled_from([None, *PREFETCH_POLICIES]),
        row_tokens=st.sampled_from([1, 1, 3]),
        scheduling=st.sampled_from([FCFS, PRIORITY]),
    )
    def start(
        self,
        prefill_pages: int,
        decode_pages: int,
        unified: bool,
        gateway_aborts: bool,
        remembered: int,
        overlap: bool,
        num_host_pages: int,
        write_policy: str,
        policy: str | None,
        row_tokens: int,
        scheduling: str,
    ) -> None:
        prefetch = None if policy is None else PrefetchConfig(policy=policy, threshold_tokens=1)
        config = small_config(
            grant_timeout_s=8.0,
            handoff_timeout_s=12.0,
            queue_timeout_s=6.0,
            max_remembered_handoffs=remembered,
            overlap=overlap,
            scheduling_policy=scheduling,
        )
        for name in PREFILLS:
            self.world.start(
                name,
                role=Role.UNIFIED if unified else Role.PREFILL,
                config=config,
                num_pages=prefill_pages,
                num_host_pages=num_host_pages,
                write_policy=write_policy,
                prefetch=prefetch,
                row_tokens=row_tokens,
            )
        for name in DECODES:
            self.world.start(
                name,
                role=Role.DECODE,
                config=config,
                num_pages=decode_pages,
                num_host_pages=num_host_pages,
                write_policy=write_policy,
                prefetch=prefetch,
                row_tokens=row_tokens,
            )
        self.gateway_aborts = gateway_aborts

    def engine(self, name: str) -> SimEngine:
        return self.world.engines[name]

    @rule(
        prefill=st.sampled_from(PREFILLS),
        decode=st.sampled_from(DECODES),
        prompt=PROMPTS,
        max_tokens=st.integers(0, 8),
        resumed=st.sampled_from([0, 0, 2]),
        client=st.sampled_from(["k/h/1", "k/h/2", "l/h/1"]),
        scored_from=st.sampled_from([None, None, 0, 5]),
        priority=st.sampled_from([0, 0, -1, 6]),
    )
    def submit(
        self,
        prefill: str,
        decode: str,
        prompt: list[int],
        max_tokens: int,
        resumed: int,
        client: str = "",
        scored_from: int | None = None,
        priority: int = 0,
    ) -> None:
        self.count += 1
        request = sim_request(
            f"r{self.count}",
            prompt,
            max_tokens=max_tokens,
            seed=self.count,
            constraint=None if self.count % 5 else Constraint(kind="regex"),
            output_token_ids=tuple(range(10, 10 + resumed)),
            client=client,
            priority=priority,
            prompt_logprobs=None if scored_from is None else 1,
            prompt_logprobs_start=scored_from or 0,
        )
        self.world.submit_pair(request, self.engine(prefill), self.engine(decode))

    @rule(prefill=st.sampled_from(PREFILLS), prompt=PROMPTS)
    def submit_whole(self, prefill: str, prompt: list[int]) -> None:
        self.count += 1
        engine = self.engine(prefill)
        max_tokens = 8 if engine.role is Role.UNIFIED else 1
        self.world.submit(sim_request(f"r{self.count}", prompt, max_tokens=max_tokens), engine)

    @rule(which=st.integers(1, 20), side=st.sampled_from([None, 0, 1]))
    def abort(self, which: int, side: int | None) -> None:
        submitted = self.world.submitted.get(f"r{which}")
        if submitted is not None:
            engines = submitted.engines
            self.world.abort(f"r{which}", None if side is None else engines[side % len(engines)][0])

    @rule(name=NAMES, finishes=st.booleans(), copies=st.integers(0, 3), times=st.integers(1, 3))
    def work(self, name: str, finishes: bool, copies: int, times: int) -> None:
        engine = self.engine(name)
        for _ in range(times):
            for _ in range(copies):
                engine.transport.advance()
                engine.mover.advance()
                if engine.store is not None:
                    engine.store.advance()
            if finishes:
                engine.finish_step()
            engine.step()
            self.world.now_s += 0.01

    @rule(pick=st.integers(0, 50), twice=st.booleans(), times=st.integers(1, 4))
    def deliver(self, pick: int, twice: bool, times: int) -> None:
        wires = self.world.wires.waiting()
        if wires:
            for _ in range(times):
                self.world.deliver(wires[pick % len(wires)], twice=twice)

    @rule(name=NAMES)
    def work_and_deliver_all(self, name: str) -> None:
        for wire in sorted(self.world.wires):
            if wire[1] in (name, self.engine(name).epoch):
                while self.world.wires.num_waiting(wire):
                    self.world.deliver(wire)
        self.work(name, True, 2, 2)

    @rule(by_s=st.sampled_from([0.3, 1.1, 7.0, 13.0]))
    def time_passes(self, by_s: float) -> None:
        self.world.now_s += by_s

    @rule(name=NAMES)
    def kill_and_restart(self, name: str) -> None:
        self.world.kill(self.engine(name))

    @rule(name=st.sampled_from(PREFILLS), how=st.sampled_from(["corrupt_next", "fail_next"]))
    def break_transfer(self, name: str, how: str) -> None:
        setattr(self.engine(name).transport, how, True)

    @rule(prefill=st.sampled_from(PREFILLS), decode=st.sampled_from(DECODES), host=st.booleans())
    def repeat_prompt(self, prefill: str, decode: str, host: bool) -> None:
        """Repeat a prompt whose pages are only in the host tier by now, or in the store."""
        self.settle_all()
        for name in (prefill, decode):
            self.world.forget(self.engine(name), host=host)
        self.submit(prefill, decode, [1] * 13, 3, 0)

    @rule()
    def settle_all(self) -> None:
        self.world.settle(max_rounds=2000)

    @rule(name=NAMES)
    def evict_device_pages(self, name: str) -> None:
        self.world.forget(self.engine(name), host=False)

    @rule(name=NAMES)
    def fail_next_copy(self, name: str) -> None:
        self.engine(name).mover.fail_next = True

    @rule(name=NAMES, hangs=st.booleans(), overclaims=st.booleans())
    def store_fault(self, name: str, hangs: bool, overclaims: bool) -> None:
        store = self.engine(name).store
        if store is not None:
            store.fail_next, store.overclaims = True, overclaims
            if hangs:
                store.hang()
            else:
                store.hung.clear()

    @rule(name=NAMES)
    def fail_step(self, name: str) -> None:
        self.engine(name).fail_next_step = True

    def teardown(self) -> None:
        if self.world.engines:
            for engine in self.world.by_epoch.values():
                engine.fail_next_step = engine.transport.fail_next = engine.transport.corrupt_next = False
            if self.gateway_aborts:
                for request_id in self.world.submitted:
                    self.world.abort(request_id)
            self.world.settle(max_rounds=2000)
            self.world.check_settled()


def test_handoffs_keep_their_promises_over_a_lossy_wire() -> None:
    run_state_machine_as_test(
        Cluster,
        settings=settings(
            max_examples=budget(30, long=2000), stateful_step_count=50, suppress_health_check=list(HealthCheck)
        ),
    )
