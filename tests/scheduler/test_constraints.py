"""Constrained requests wait for their grammar, and get the tokens of an undisturbed engine however they are run."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.kv.tiers.prefetch import PrefetchConfig
from kvist.plan.grammars import GrammarCompiled
from kvist.plan.tiers import FindPages
from kvist.request import Constraint, EngineRequest, Outcome, RequestId, Role
from kvist.scheduler.active import RequestState
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.device import forbidden_tokens, reference_stream
from kvist.simulation.engine import SimEngine, small_config
from tests.budget import budget

CONSTRAINT = Constraint(kind="regex", text="a")


def ended(world: SimCluster, request_id: str, engine: SimEngine) -> tuple[Outcome, str | None]:
    [end] = world.ended[request_id, engine.epoch]
    return end.outcome, end.error_code


def test_a_request_waits_for_its_grammar_and_others_do_not() -> None:
    world = SimCluster()
    engine = world.start("u")
    engine.holds_grammars = True
    world.submit(sim_request("constrained", [1] * 5, constraint=CONSTRAINT), engine)
    world.submit(sim_request("free", [2] * 5), engine)
    world.deliver(("gateway", "u"))
    world.deliver(("gateway", "u"))
    plan = engine.step()
    assert [(job.request_id, job.constraint) for job in plan.grammar_jobs] == [("constrained", CONSTRAINT)]
    assert engine.running == ["free"]
    waiting = engine.scheduler.requests.live["constrained"]  # type: ignore[index]
    assert waiting.state is RequestState.COMPILING
    assert engine.scheduler.status().num_waiting == 1
    engine.holds_grammars = False
    world.settle()
    world.check_settled()
    assert ended(world, "constrained", engine) == ended(world, "free", engine) == (Outcome.FINISHED, None)
    assert not set(world.stream("constrained")[0][:1]) & forbidden_tokens([])


def test_a_request_whose_grammar_is_known_is_in_the_next_batch_and_needs_no_job() -> None:
    world = SimCluster()
    engine = world.start("u")
    engine.holds_grammars = True
    world.submit(sim_request("known", [1] * 5, constraint=CONSTRAINT), engine)
    world.submit(sim_request("new", [2] * 5, constraint=CONSTRAINT), engine)
    world.deliver(("gateway", "u"))
    world.deliver(("gateway", "u"))
    engine.events.append(GrammarCompiled(request_id=RequestId("known")))
    plan = engine.step()
    assert [job.request_id for job in plan.grammar_jobs] == ["new"]
    assert engine.running == ["known"]
    engine.holds_grammars = False
    world.settle()
    world.check_settled()


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_constraint_that_cannot_be_compiled_fails_its_request_at_each_engine(role: Role) -> None:
    world = SimCluster()
    prefill, decode = world.start("p", role=Role.PREFILL), world.start("d", role=Role.DECODE)
    faulty = sim_request("r", [1] * 9, constraint=Constraint(kind="regex", text="faulty"))
    world.submit_pair(faulty, prefill, decode)
    world.settle()
    engine = prefill if role is Role.PREFILL else decode
    assert ended(world, "r", engine)[0] is Outcome.FAILED
    assert "invalid_constraint" in {ended(world, "r", prefill)[1], ended(world, "r", decode)[1]}


def test_vllm_54003_a_compilation_that_never_ends_fails_its_request_in_time() -> None:
    world = SimCluster()
    engine = world.start("u", config=small_config(grammar_compile_timeout_s=2.0))
    engine.holds_grammars = True
    world.submit(sim_request("slow", [1] * 5, constraint=CONSTRAINT), engine)
    world.deliver(("gateway", "u"))
    assert engine.step().wake_at_s == pytest.approx(world.now_s + 2.0)
    world.now_s += 1.9
    engine.step()
    assert engine.scheduler.requests.live
    world.now_s += 0.2
    plan = engine.step()
    assert [(end.outcome, end.error_code) for end in plan.ended] == [(Outcome.FAILED, "invalid_constraint")]
    assert "--grammar-compile-timeout-s" in plan.ended[0].message
    engine.holds_grammars = False
    world.settle()
    assert not engine.scheduler.requests.live


def test_an_aborted_request_does_not_wait_for_its_grammar() -> None:
    world = SimCluster()
    engine = world.start("u")
    engine.holds_grammars = True
    world.submit(sim_request("r", [1] * 5, constraint=CONSTRAINT), engine)
    world.deliver(("gateway", "u"))
    engine.step()
    world.abort("r")
    world.deliver(("gateway", "u"))
    engine.step()
    assert ended(world, "r", engine) == (Outcome.ABORTED, None)
    engine.holds_grammars = False
    world.settle()
    world.check_settled()


@pytest.mark.parametrize("is_fetched_first", [False, True])
def test_pages_are_fetched_while_the_grammar_is_compiled(is_fetched_first: bool) -> None:
    world = SimCluster()
    prefetch = PrefetchConfig(base_s=2.0, per_1k_s=0.0, threshold_tokens=8)
    engine = world.start("u", num_host_pages=40, prefetch=prefetch, config=small_config())
    world.submit(sim_request("first", [1] * 13, max_tokens=1), engine)
    world.settle()
    world.forget(engine, host=True)
    engine.holds_grammars = True
    world.submit(sim_request("again", [1] * 13, max_tokens=2, constraint=CONSTRAINT), engine)
    world.deliver(("gateway", "u"))
    (find,) = engine.step().tier_jobs
    assert isinstance(find, FindPages)
    request = engine.scheduler.requests.live["again"]  # type: ignore[index]
    assert request.state is RequestState.COMPILING
    assert engine.store is not None
    if is_fetched_first:
        for _ in range(4):
            engine.store.advance()
            engine.step()
        assert request.state is RequestState.COMPILING
        assert request.prefetch is not None
        assert request.prefetch.is_done
    engine.holds_grammars = False
    engine.step()
    assert (request.state is RequestState.FETCHING) is not is_fetched_first
    world.settle()
    world.check_settled()
    assert world.chunks["again"][0][1].num_cached_tokens == 12


requests = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=14), st.integers(1, 9), st.integers(0, 99)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=budget(25, long=500))
@given(requests, st.booleans(), st.integers(8, 14))
def test_unified_pair_preempted_and_resumed_engines_give_equal_constrained_tokens(
    drawn: list[tuple[list[int], int, int]], overlap: bool, num_pages: int
) -> None:
    world, config = SimCluster(), small_config(overlap=overlap)
    prefill = world.start("p", role=Role.PREFILL, config=config, num_pages=num_pages)
    decode = world.start("d", role=Role.DECODE, config=config, num_pages=num_pages)
    unified = world.start("u", config=config, num_pages=num_pages)  # few pages: requests are preempted
    wanted: dict[str, EngineRequest] = {}
    for number, (prompt, max_tokens, seed) in enumerate(drawn):
        request = sim_request(f"u{number}", prompt, max_tokens=max_tokens, seed=seed, constraint=CONSTRAINT)
        expected, _ = reference_stream(request, config, unified.context_len)
        for place in range(len(expected)):
            assert expected[place] not in forbidden_tokens(expected[:place])
        pair = msgspec.structs.replace(request, request_id=f"p{number}")
        resumed = msgspec.structs.replace(
            request, request_id=f"r{number}", output_token_ids=tuple(expected[: len(expected) // 2])
        )
        world.submit(request, unified)
        world.submit(resumed, unified)
        world.submit_pair(pair, prefill, decode)
        for each in (request, pair, resumed):
            wanted[each.request_id] = each
    world.settle()
    world.check_settled()
    assert {each for each, engine in world.ended} == set(wanted)
    for name, request in wanted.items():
        expected, _ = reference_stream(request, config, unified.context_len)
        tokens, _ = world.stream(name)
        assert tokens == expected
