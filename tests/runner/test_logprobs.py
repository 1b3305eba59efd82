"""Logprobs of tokens equal a plain log-softmax, for any mixture of rows."""

from __future__ import annotations

import torch

from kvist.request import SamplingParams
from kvist.runner.logprobs import LogprobRow, token_logprobs
from kvist.runner.sampler import SamplingRow, sample

VOCAB_SIZE = 50
LOGITS = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
REFERENCE = LOGITS.double().log_softmax(dim=-1)


def close(found: float, row: int, token_id: int) -> bool:
    return abs(found - float(REFERENCE[row, token_id])) < 1e-5


def test_each_row_gets_the_logprobs_that_it_asks_for() -> None:
    chosen = torch.tensor([3, 4, 5, 6])
    rows = [LogprobRow(0, 2, ()), LogprobRow(2, 0, (7, 7, 49)), LogprobRow(3, VOCAB_SIZE, (1,))]
    found = token_logprobs(LOGITS, rows, chosen, with_ranks=True).by_row()
    assert list(found) == [0, 2, 3]
    for place, num_top, asked in rows:
        one, token_id = found[place], int(chosen[place])
        best = REFERENCE[place].argsort(descending=True).tolist()
        assert close(one.logprob, place, token_id)
        assert list(one.top_token_ids) == best[:num_top]
        assert all(close(value, place, top) for top, value in zip(one.top_token_ids, one.top_logprobs, strict=True))
        assert all(close(value, place, each) for each, value in zip(asked, one.requested_logprobs, strict=True))
        assert one.rank == best.index(token_id) + 1


def test_equally_likely_tokens_share_the_better_rank() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    ranks = [
        token_logprobs(logits, [LogprobRow(0, 0, ())], torch.tensor([token_id]), with_ranks=True).by_row()[0].rank
        for token_id in range(4)
    ]
    assert ranks == [3, 1, 1, 4]


def test_a_sampled_token_has_the_logprobs_of_the_asked_tokens_and_no_rank() -> None:
    asked = SamplingParams(max_tokens=1, num_logprobs=0, logprob_token_ids=(9, 2))
    params = [SamplingParams(max_tokens=1), asked]
    found = sample(LOGITS[:2], [SamplingRow(params=each, position=1) for each in params]).logprobs
    assert list(found) == [1]
    assert all(close(value, 1, token_id) for token_id, value in zip((9, 2), found[1].requested_logprobs, strict=True))
    assert len(found[1].requested_logprobs) == 2
    assert found[1].rank is None
