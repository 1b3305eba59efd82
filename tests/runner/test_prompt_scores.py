"""Prompts are scored as a plain forward pass in fp32 scores them, however their tokens are split into chunks."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest
import torch

from kvist.checkpoint import Checkpoint
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.request import RequestId, SamplingParams, SlotId
from kvist.runner import prompt_scores, tp
from tests.preloaded import POPEN
from tests.runner.hand_driven import PlainEngine, make_runner
from tests.runner.scoring import SCORED, assert_scores, plain_logprobs, score

PROMPT: list[int] = torch.randint(211, (33,), generator=torch.Generator().manual_seed(8)).tolist()


@pytest.mark.parametrize("slice_rows", [5, 256])
@pytest.mark.parametrize("cuts", [[], [1], [4, 8, 9, 30], [32]])
def test_chunks_have_the_scores_of_a_plain_forward_pass(
    engine: PlainEngine, monkeypatch: pytest.MonkeyPatch, cuts: list[int], slice_rows: int
) -> None:
    monkeypatch.setattr(prompt_scores, "_SLICE_ROWS", slice_rows)
    edges = [0, *cuts, len(PROMPT)]
    found = score(engine.runner, PROMPT, pages=engine.pages(34), parts=list(itertools.pairwise(edges)))
    assert len(found) == len(PROMPT) - 1
    assert_scores(found, plain_logprobs(engine.runner.model, PROMPT), PROMPT, 1e-4)


def test_the_prompt_after_a_cached_prefix_is_scored(engine: PlainEngine) -> None:
    pages = engine.pages(34)
    engine.generate(PROMPT, SamplingParams(max_tokens=1), pages=pages)
    engine.step()  # ends the request
    found = score(engine.runner, PROMPT, pages=pages, parts=[(16, 33)])
    assert len(found) == 16
    assert_scores(found, plain_logprobs(engine.runner.model, PROMPT), PROMPT, 1e-4)


def test_a_batch_scores_each_request_by_its_own_parameters(engine: PlainEngine) -> None:
    few = msgspec.structs.replace(SCORED, prompt_logprobs=0, logprob_token_ids=())
    params = [SamplingParams(max_tokens=9), SCORED, few]
    started = tuple(
        StartRequest(
            slot=SlotId(slot), request_id=RequestId(str(slot)), sampling=each, token_ids=(), num_prompt_tokens=1
        )
        for slot, each in enumerate(params)
    )
    plain = BatchItem(slot=SlotId(0), token_ids=PROMPT[:3], start=0, page_ids=engine.pages(3), samples=True)
    whole = BatchItem(
        slot=SlotId(1),
        token_ids=PROMPT[:9],
        start=0,
        page_ids=engine.pages(9),
        samples=False,
        score_from=4,
        scored_token_ids=PROMPT[4:10],
    )
    other = BatchItem(
        slot=SlotId(2),
        token_ids=PROMPT[:9],
        start=0,
        page_ids=engine.pages(9),
        samples=True,
        score_from=1,
        scored_token_ids=PROMPT[1:9],
    )
    sampled = engine.runner.launch(Batch(step_id=1, started=started, items=(plain, whole, other))).result()
    assert len(sampled) == 2
    assert sorted(sampled.prompt_logprobs) == [1, 2]
    expected = plain_logprobs(engine.runner.model, PROMPT)
    assert_scores(sampled.prompt_logprobs[1], expected, PROMPT[:10], 1e-4)
    assert [each.top_token_ids for each in sampled.prompt_logprobs[2]] == [()] * 8
    assert [each.logprob for each in sampled.prompt_logprobs[2][3:]] == pytest.approx(
        [each.logprob for each in sampled.prompt_logprobs[1][:5]], abs=1e-4
    )


@pytest.mark.e2e
def test_two_ranks_score_as_one(
    engine: PlainEngine, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tp, "subprocess", POPEN)
    runner = make_runner(tiny_checkpoint, tmp_path / "two", tp=2)
    try:
        found = score(runner, PROMPT, pages=engine.pages(34), parts=[(0, 1), (1, 20), (20, 33)])
    finally:
        runner.close()
    assert_scores(found, plain_logprobs(engine.runner.model, PROMPT), PROMPT, 1e-4)
