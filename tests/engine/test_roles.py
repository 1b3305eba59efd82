"""An engine's role, and its switch while the engine serves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist import wire
from kvist.engine.roles import RoleSwitch, SwitchMeter, SwitchState
from kvist.errors import Conflict
from kvist.plan.events import RoleChanged
from kvist.request import HandoffId, Mode, Outcome, Role
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.engine import SimEngine, small_config
from kvist.testing.loop_bench import LoopBench
from kvist.testing.specs import make_spec

G1, G2 = b"gateway-1", b"gateway-2"
ROLES = st.sampled_from(list(Role))
EVERY_MODE = frozenset(Mode)


def change(role: Role, modes: frozenset[Mode], usual: int | None = None) -> RoleChanged:
    return RoleChanged(role=role, modes=modes, usual_step_tokens=usual)


# ---------------------------------------------------------------- the machine


def test_an_engine_that_was_never_switched_sends_its_scheduler_nothing() -> None:
    roles = RoleSwitch(Role.PREFILL)
    assert roles.update([Role.PREFILL, Role.PREFILL]) is None
    assert roles.state is SwitchState.SERVING


def test_the_modes_of_the_earlier_role_are_admitted_until_every_gateway_follows_the_new_one() -> None:
    roles = RoleSwitch(Role.PREFILL, usual_step_tokens={Role.PREFILL: 2048, Role.DECODE: 512, Role.UNIFIED: 512})
    roles.request(Role.DECODE)
    assert roles.update([Role.PREFILL, Role.PREFILL]) == change(Role.DECODE, EVERY_MODE, 512)
    assert (roles.state, roles.earlier_roles) == (SwitchState.SWITCHING, (Role.PREFILL,))
    assert roles.update([Role.DECODE, Role.PREFILL]) is None
    assert roles.update([Role.DECODE, Role.DECODE]) == change(Role.DECODE, Role.DECODE.modes, 512)
    assert roles.state is SwitchState.SERVING
    assert roles.update([Role.DECODE, Role.PREFILL]) == change(Role.DECODE, EVERY_MODE, 512), "a new gateway"


def test_a_restarted_engine_goes_on_in_the_role_of_the_process_before_it() -> None:
    roles = RoleSwitch(Role.PREFILL, present=Role.DECODE)
    assert roles.update([]) == change(Role.DECODE, Role.DECODE.modes)


def test_pages_that_no_transport_reaches_keep_an_engine_unified() -> None:
    roles = RoleSwitch(Role.UNIFIED, hands_over=False)
    with pytest.raises(Conflict, match=r"no transport reaches its pages. Start it with --role decode"):
        roles.request(Role.DECODE)
    roles.request(Role.UNIFIED)
    assert roles.role is Role.UNIFIED


def test_the_meter_counts_switches_and_the_time_until_every_gateway_follows() -> None:
    roles, meter = RoleSwitch(Role.PREFILL), SwitchMeter()

    def note(now_s: float, *known: Role) -> float | None:
        roles.update(known)
        return meter.note(roles, now_s)

    assert note(0.0, Role.PREFILL) is None
    roles.request(Role.DECODE)
    assert note(1.0, Role.PREFILL, Role.PREFILL) is None
    assert note(1.5, Role.DECODE, Role.PREFILL) is None
    assert note(3.0, Role.DECODE, Role.DECODE) == 2.0
    assert note(4.0, Role.DECODE) is None
    roles.request(Role.PREFILL)
    assert note(5.0) == 0.0, "there is no gateway"
    assert meter.totals() == {"role_switches": 2.0, "role_switch_seconds": 2.0}


# ---------------------------------------------------------------- the loop


@pytest.fixture
def engine() -> LoopBench:
    return LoopBench(spec=make_spec(role=Role.PREFILL))


def newest(engine: LoopBench, gateway: bytes = G1) -> wire.LoadReport:
    return engine.sent(wire.LoadReport, gateway)[-1]


def test_a_switch_is_answered_and_reported_to_every_gateway_at_once(engine: LoopBench) -> None:
    engine.iterate((G1, wire.Hello(gateway_id="1")), (G2, wire.Hello(gateway_id="2")))
    assert newest(engine).role is Role.PREFILL
    events = engine.iterate((G1, wire.SetRole(call_id="c", role=Role.DECODE)))
    assert events == [change(Role.DECODE, EVERY_MODE)]
    assert engine.sent(wire.RoleAnswer) == [wire.RoleAnswer(call_id="c")]
    for gateway in (G1, G2):
        assert (newest(engine, gateway).role, newest(engine, gateway).earlier_roles) == (Role.DECODE, (Role.PREFILL,))
    assert engine.iterate((G1, wire.Hello(gateway_id="1", known_role=Role.DECODE))) == []
    assert engine.iterate((G2, wire.Hello(gateway_id="2", known_role=Role.DECODE))) == [
        change(Role.DECODE, Role.DECODE.modes)
    ]
    assert newest(engine).earlier_roles == ()
    assert engine.loop.role is Role.DECODE


def test_a_gateway_of_an_older_version_is_served_by_the_role_of_the_spec(engine: LoopBench) -> None:
    engine.iterate((G1, wire.Hello(gateway_id="1")))
    engine.iterate((G1, wire.SetRole(call_id="c", role=Role.DECODE)))
    for _ in range(3):
        assert engine.iterate((G1, wire.Hello(gateway_id="1"))) == []
    assert newest(engine).earlier_roles == (Role.PREFILL,)
    assert [welcome.spec.role for welcome in engine.sent(wire.Welcome)] == [Role.PREFILL] * 4, "never another worker"


def test_a_gateway_that_leaves_ends_the_switch(engine: LoopBench) -> None:
    engine.iterate((G1, wire.Hello(gateway_id="1")))
    engine.iterate((G1, wire.SetRole(call_id="c", role=Role.DECODE)))
    engine.clock.advance(60.0)
    engine.iterate()
    assert engine.iterate() == [change(Role.DECODE, Role.DECODE.modes)]


# ---------------------------------------------------------------- whole engines


class Cluster:
    """Three engines, and a gateway that learns their roles late. Mutable; owned by one test."""

    def __init__(self) -> None:
        self.world = SimCluster()
        config = small_config(max_queued_requests=100)
        self.engines = [self.world.start(name, config=config, num_pages=40, role=Role.UNIFIED) for name in "abc"]
        self.roles = {engine.name: RoleSwitch(Role.UNIFIED) for engine in self.engines}
        self.known = {engine.name: Role.UNIFIED for engine in self.engines}
        self.num_asked = 0

    def switch(self, name: str, role: Role) -> None:
        self.roles[name].request(role)
        self._update(name)

    def learn(self, name: str) -> None:
        """Let the gateway learn the role, and the engine that the gateway has learnt it."""
        while self.world.wires.num_waiting(("gateway", name)):  # the Hello comes after all that was sent before
            self.world.deliver(("gateway", name))
        self.known[name] = self.roles[name].role
        self._update(name)

    def _update(self, name: str) -> None:
        event = self.roles[name].update([self.known[name]])
        if event is not None:
            self.world.engines[name].events.append(event)

    def ask(self, place: int) -> None:
        self.num_asked += 1
        request = sim_request(f"r{self.num_asked}", range(1 + place % 7, 12), seed=place)
        pairs = [
            (p, d)
            for p in self.engines
            for d in self.engines
            if Mode.PREFILL in self.known[p.name].modes and Mode.DECODE in self.known[d.name].modes and p is not d
        ]
        if pairs:
            self.world.submit_pair(request, *pairs[place % len(pairs)])
        else:
            self.world.submit(request, self.engines[place % len(self.engines)])

    def engine(self, name: str) -> SimEngine:
        return self.world.engines[name]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("switch"), st.sampled_from("abc"), ROLES),
        st.tuples(st.just("learn"), st.sampled_from("abc"), st.none()),
        st.tuples(st.just("run"), st.sampled_from("abc"), st.none()),
        st.tuples(st.just("ask"), st.integers(0, 40), st.none()),
    ),
    max_size=50,
)


@given(steps=STEPS)
@settings(max_examples=80, deadline=None)
def test_switches_at_any_time_leave_every_stream_equal_to_its_twin(steps: list[tuple[str, object, object]]) -> None:
    """`check_settled` compares each stream with that of an undisturbed engine, and finds pages that leak."""
    cluster = Cluster()
    for what, which, role in steps:
        if what == "ask":
            assert isinstance(which, int)
            cluster.ask(which)
            continue
        assert isinstance(which, str)
        if what == "switch":
            assert isinstance(role, Role)
            cluster.switch(which, role)
        elif what == "learn":
            cluster.learn(which)
        else:
            for link in list(cluster.world.wires):
                cluster.world.deliver(link)
            engine = cluster.engine(which)
            engine.transport.advance()
            engine.finish_step()
            engine.step()
    cluster.world.settle()
    cluster.world.check_settled()
    for request_id, submitted in cluster.world.submitted.items():
        for engine, _ in submitted.engines:
            assert cluster.world.outcome(request_id, engine) is Outcome.FINISHED


def test_a_request_for_another_role_is_refused_in_a_way_that_the_gateway_sends_it_elsewhere() -> None:
    world = SimCluster()
    prefill, decode = world.start("p", role=Role.PREFILL), world.start("d", role=Role.PREFILL)
    handoff_id: HandoffId = world.submit_pair(sim_request("r", range(9)), prefill, decode)
    world.settle()
    [refused] = world.ended["r", decode.epoch]
    assert (refused.outcome, refused.error_code) == (Outcome.FAILED, "unavailable"), handoff_id
    assert refused.message.startswith("this worker has the role prefill")
