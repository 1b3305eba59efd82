"""The cluster of test_handoff_machine.py, driven by a random generator: longer runs, closer to real traffic."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvist.request import Role
from kvist.scheduler.handoff.source import SourceSide
from kvist.scheduler.handoff.tables import SOURCE_TRANSITIONS, TARGET_TRANSITIONS, SourceTrigger, TargetTrigger
from kvist.scheduler.handoff.target import TargetSide
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.engine import small_config
from tests.budget import budget

Trigger = SourceTrigger | TargetTrigger


FIRST_SEEDS = (107, 2, 125, 32, 508)  # take every transition; another version of the code may need further seeds


def one_run(seed: int) -> SimCluster:
    rng = random.Random(seed)
    world = SimCluster()
    config = small_config(
        grant_timeout_s=8.0,
        handoff_timeout_s=12.0,
        queue_timeout_s=6.0,
        max_remembered_handoffs=rng.choice([1, 64]),
        overlap=rng.random() < 0.5,
    )
    role = rng.choice([Role.UNIFIED, Role.PREFILL])
    for name in ("p0", "p1"):
        world.start(name, role=role, config=config, num_pages=rng.randint(6, 14))
    for name in ("d0", "d1"):
        world.start(name, role=Role.DECODE, config=config, num_pages=rng.randint(6, 14))
    fault = rng.choice([0.0, 0.01, 0.04])
    for _ in range(300):
        if rng.random() < fault:
            inject_fault(world, rng)
        turn = rng.random()
        if turn < 0.1 and len(world.submitted) < 12:
            count = len(world.submitted)
            request = sim_request(
                f"r{count}",
                [rng.randint(0, 2) for _ in range(rng.randint(1, 18))],
                max_tokens=rng.randint(1, 8),
                seed=count,
                prompt_logprobs=3 if count % 3 == 1 else None,
            )
            prefill, decode = world.engines[rng.choice(["p0", "p1"])], world.engines[rng.choice(["d0", "d1"])]
            world.submit_pair(request, prefill, decode)
        elif turn < 0.55:
            engine = world.engines[rng.choice(list(world.engines))]
            for _ in range(rng.randint(0, 4)):
                engine.transport.advance()
            if rng.random() < 0.8:
                engine.finish_step()
            engine.step()
            world.now_s += 0.01
        else:
            wires = world.wires.waiting()
            for _ in range(rng.randint(1, 4) if wires else 0):
                world.deliver(rng.choice(wires), twice=rng.random() < 0.1)
    for engine in world.by_epoch.values():
        engine.fail_next_step = engine.transport.fail_next = engine.transport.corrupt_next = False
    world.settle(max_rounds=2000)
    world.check_settled()
    return world


def inject_fault(world: SimCluster, rng: random.Random) -> None:
    engine = world.engines[rng.choice(list(world.engines))]
    what = rng.randrange(7)
    if what == 0 and world.submitted:
        world.abort(rng.choice(list(world.submitted)), rng.choice([None, engine]))
    elif what == 1:
        world.kill(engine)
    elif what == 2:
        engine.fail_next_step = True
    elif what == 3:
        engine.transport.fail_next = True
    elif what == 4:
        engine.transport.corrupt_next = True
    elif what == 5:
        world.break_connection(engine)
    else:
        world.now_s += rng.choice([0.3, 1.1, 7.0, 13.0])


def test_clusters_keep_their_promises_under_random_faults_and_take_every_transition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: set[tuple[object, Trigger]] = set()
    for side in (SourceSide, TargetSide):
        original = side._fire

        def fire(self: Any, handoff: Any, trigger: Trigger, *args: Any, _original: Any = original) -> Any:
            tried.add((handoff.state, trigger))
            return _original(self, handoff, trigger, *args)

        monkeypatch.setattr(side, "_fire", fire)
    moves: set[tuple[object, Trigger]] = {(state, t) for state, row in SOURCE_TRANSITIONS.items() for t in row}
    moves |= {(state, t) for state, row in TARGET_TRANSITIONS.items() for t in row}
    # all engines here have one layout
    moves = {move for move in moves if move[1] is not SourceTrigger.BAD_GRANT}
    num_seeds = budget(40, long=3000)
    for number, seed in enumerate((*FIRST_SEEDS, *range(max(1000, num_seeds)))):
        if number >= num_seeds and moves <= tried:
            break
        one_run(seed)
    assert moves - tried == set()
    assert TargetTrigger.MISMATCH in {trigger for _, trigger in tried}


def test_without_faults_every_stream_finishes_and_equals_unified() -> None:
    for seed in range(20):
        world = SimCluster()
        config = small_config(max_queued_requests=20, overlap=seed % 2 == 1)
        prefill = world.start("p0", role=Role.PREFILL, config=config, num_pages=14)
        decode = world.start("d0", role=Role.DECODE, config=config, num_pages=12)
        rng = random.Random(seed)
        for index in range(10):
            prompt = [rng.randint(0, 2) for _ in range(rng.randint(1, 20))]
            world.submit_pair(sim_request(f"r{index}", prompt, max_tokens=9, seed=index), prefill, decode)
        world.settle()
        world.check_settled()
        assert all(ended.outcome.value == "finished" for (ended,) in world.ended.values())
        totals = decode.scheduler.status().totals
        assert totals["handoffs_received"] == 10
        assert totals["requests_failed"] == 0
