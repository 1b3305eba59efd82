"""Which tokens of a prompt each step scores, and when their logprobs are sent."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.request import FinishReason, Role
from kvist.scheduler import batching
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.device import reference_scores
from kvist.simulation.engine import SimEngine, small_config
from kvist.wire import TokenChunk

PROMPT = [(index * 7) % 20 for index in range(14)]


def unified(num_pages: int = 12, **config: Any) -> SimEngine:
    return SimCluster().start("u", role=Role.UNIFIED, config=small_config(**config), num_pages=num_pages)


def run_out(engine: SimEngine) -> None:
    engine.world.settle()
    engine.world.check_settled()


def pieces(engine: SimEngine, request_id: str) -> list[tuple[int, int]]:
    """Return (first position, end) of each piece of prompt logprobs that was sent."""
    chunks = [chunk for _, chunk in engine.world.chunks[request_id] if chunk.prompt_logprobs]
    return [(chunk.prompt_position, chunk.prompt_position + len(chunk.prompt_logprobs)) for chunk in chunks]


def answers(engine: SimEngine, request_id: str) -> list[TokenChunk]:
    return [chunk for _, chunk in engine.world.chunks[request_id] if not chunk.prompt_logprobs]


def test_each_chunk_sends_the_logprobs_of_the_tokens_that_it_predicts() -> None:
    engine = unified(chunked_prefill_size=6)
    engine.world.submit(sim_request("a", PROMPT, prompt_logprobs=1), engine)
    run_out(engine)
    assert pieces(engine, "a") == [(1, 7), (7, 13), (13, 14)]  # the last chunk predicts the first token, too


def test_a_cached_prefix_is_computed_again_from_the_first_scored_token_on() -> None:
    engine = unified()
    engine.world.submit(sim_request("first", PROMPT), engine)
    run_out(engine)
    for start, num_cached in ((0, 0), (5, 4), (8, 4), (9, 8), (14, 12), (40, 12)):
        request = sim_request(f"from {start}", PROMPT, prompt_logprobs=0, prompt_logprobs_start=start)
        engine.world.submit(request, engine)
        run_out(engine)
        found = pieces(engine, request.request_id)
        assert [piece[0] for piece in found[:1]] == [max(1, start)][: len(reference_scores(request))]
        assert answers(engine, request.request_id)[0].num_cached_tokens == num_cached


@pytest.mark.parametrize("overlap", [False, True])
def test_a_preempted_request_scores_only_tokens_that_it_has_not_reported(overlap: bool) -> None:
    engine = unified(num_pages=6, chunked_prefill_size=2, overlap=overlap)
    engine.world.submit(sim_request("grows", PROMPT[10:], max_tokens=14, ignore_eos=True), engine)
    engine.world.submit(sim_request("scored", PROMPT[:12], max_tokens=2, prompt_logprobs=2), engine)
    run_out(engine)
    assert engine.scheduler.status().totals["preemptions"] == 1
    edges = [edge for piece in pieces(engine, "scored") for edge in piece]
    assert (edges[0], edges[-1]) == (1, 12)
    assert edges[1:-1:2] == edges[2::2], "each piece begins where the piece before ends"
    computed = engine.scheduler.status().totals["computed_prompt_tokens"]
    assert 0 <= computed - (4 + 12) <= 4, "only the page that the other request took is computed again"


def test_the_logprobs_of_one_step_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MAX_STEP_LOGPROBS", 8)
    engine = unified(chunked_prefill_size=9)
    engine.world.submit(sim_request("a", PROMPT, prompt_logprobs=1, prompt_logprobs_start=3), engine)
    engine.world.submit(sim_request("b", PROMPT[5:], prompt_logprobs=1), engine)
    engine.world.submit(sim_request("plain", PROMPT[2:]), engine)
    counts = []
    for _ in range(40):
        for wire in list(engine.world.wires):
            engine.world.deliver(wire)
        engine.finish_step()
        counts.append(sum(2 * len(chunk.prompt_logprobs) for chunk in engine.step().chunks))
    assert max(counts) == 8
    assert sum(counts) == 2 * (11 + 8)
    run_out(engine)


def test_max_tokens_0_ends_with_the_prompt_and_sends_no_token() -> None:
    engine = unified()
    for request in (
        sim_request("plain", PROMPT, max_tokens=0),
        sim_request("again", PROMPT[:13], max_tokens=0),  # only its last token is computed
        sim_request("scored", PROMPT, max_tokens=0, prompt_logprobs=0),
        sim_request("full", [*PROMPT, *PROMPT, *PROMPT[:12]], max_tokens=0, prompt_logprobs=0),
    ):
        engine.world.submit(request, engine)
        run_out(engine)
        (chunk,) = answers(engine, request.request_id)
        assert (chunk.position, chunk.token_ids, chunk.finish_reason) == (0, (), FinishReason.LENGTH)
        assert chunk.num_cached_tokens is not None
    assert engine.scheduler.status().totals["generation_tokens"] == 0
    assert engine.scheduler.status().totals["requests_finished"] == 4


def test_prefill_reports_the_prompt_and_decode_does_not() -> None:
    world = SimCluster()
    prefill = world.start("p", role=Role.PREFILL, config=small_config())
    decode = world.start("d", role=Role.DECODE, config=small_config())
    world.submit_pair(sim_request("a", PROMPT, prompt_logprobs=1), prefill, decode)
    world.settle()
    world.check_settled()
    sent = [(epoch, len(chunk.prompt_logprobs)) for epoch, chunk in world.chunks["a"] if chunk.prompt_logprobs]
    assert {epoch for epoch, _ in sent} == {prefill.epoch}
    assert sum(count for _, count in sent) == 13


def test_a_request_with_earlier_output_reports_no_logprobs_of_its_prompt() -> None:
    engine = unified()
    engine.world.submit(sim_request("rest", PROMPT, output_token_ids=(5, 6), prompt_logprobs=1), engine)
    run_out(engine)
    assert pieces(engine, "rest") == []
