"""Pairs of engines on one host, by each transport between CPUs; pages that arrive changed, which change no answer."""

from __future__ import annotations

import pytest

from kvist.request import Outcome, Role
from kvist.testing.memory_cluster import MemoryCluster
from kvist.testing.specs import RequestFields
from kvist.transfer import TRANSPORTS
from tests.engine.conftest import request_of

SEEDED: RequestFields = {"temperature": 1.3, "top_k": 50, "seed": 12345}
PROMPT = tuple(3 + (7 * place) % 120 for place in range(33))
KINDS = {name: row.make({}) for name, row in TRANSPORTS.items()}
ON_ONE_HOST = [name for name, kind in KINDS.items() if kind.same_host and ("cpu", "cpu") in kind.device_pairs]


@pytest.fixture
def answer(world: MemoryCluster) -> list[int]:
    """The answer of one engine."""
    alone = world.start()
    tokens = world.answer(alone, request_of("alone", PROMPT, **SEEDED)).token_ids
    world.kill(alone)
    return tokens


@pytest.mark.parametrize("transport", ON_ONE_HOST)
def test_a_pair_gives_the_tokens_of_one_engine_by_each_transport(
    world: MemoryCluster, answer: list[int], transport: str
) -> None:
    prefill = world.start(role=Role.PREFILL)
    decode = world.start(role=Role.DECODE, transports=transport)
    stream = world.submit_pair(prefill, decode, request_of("pair", PROMPT, **SEEDED))
    world.run()
    assert stream.token_ids == answer
    assert stream.handoff is not None
    assert stream.handoff.transport == transport
    assert stream.handoff.transport_reason.startswith(f"{transport}: both pools are in the memory of host ")
    world.check_ledgers()


def test_engines_without_a_common_transport_refuse_the_handoff_on_both_sides(world: MemoryCluster) -> None:
    prefill = world.start(role=Role.PREFILL, transports="shm")
    decode = world.start(role=Role.DECODE, transports="host-staged")
    stream = world.submit_pair(prefill, decode, request_of("pair", PROMPT, **SEEDED))
    world.run(step_s=1.0)  # until prefill has waited for a Grant long enough
    assert [ended.outcome for ended in stream.ended] == [Outcome.FAILED] * 2
    assert "shm: worker" in "".join(ended.message for ended in stream.ended)
    world.check_ledgers()


@pytest.mark.parametrize("overlap", [False, True])
def test_an_answer_is_the_same_when_its_pages_arrive_changed(
    world: MemoryCluster, answer: list[int], overlap: bool
) -> None:
    prefill = world.start(role=Role.PREFILL)
    decode = world.start(role=Role.DECODE, overlap=overlap)
    for number in range(2):
        if not number:
            decode.change_next_arrival()
        stream = world.submit_pair(prefill, decode, request_of(f"pair-{number}", PROMPT, **SEEDED))
        world.run()
        assert stream.token_ids == answer
        assert [ended.outcome for ended in stream.ended] == [Outcome.FINISHED] * 2
        assert stream.handoff is not None
        assert stream.handoff.num_pages_recomputed == (9 if not number else 0)
    assert decode.scheduler.status().totals["handoff_checksum_mismatches"] == 1
    world.check_ledgers()
