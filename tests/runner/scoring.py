"""Scores a prompt with a runner, part by part, and with a plain forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.kernels.operands import Rotary
from kvist.kernels.rotary import rotated_heads
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.request import RequestId, SamplingParams, SlotId, TokenLogprobs
from kvist.runner.runner import AnyRunner

SCORED = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=3, logprob_token_ids=(9, 2))


def score(
    runner: AnyRunner,
    prompt: Sequence[int],
    *,
    pages: list[int],
    parts: Sequence[tuple[int, int]],
    sampling: SamplingParams = SCORED,
) -> list[TokenLogprobs]:
    """Return the logprobs of the tokens from position `parts[0][0]` + 1 on. `parts`: the chunks, half-open ranges."""
    start = StartRequest(
        slot=SlotId(0),
        request_id=RequestId("r"),
        sampling=sampling,
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
    )
    found: list[TokenLogprobs] = []
    for number, (first, end) in enumerate(parts):
        scored = prompt[first + 1 : end + 1]
        item = BatchItem(
            slot=SlotId(0),
            token_ids=prompt[first:end],
            start=first,
            page_ids=pages,
            samples=end == len(prompt),
            score_from=first + 1 if scored else None,
            scored_token_ids=scored,
        )
        started = () if number else (start,)
        sampled = runner.launch(Batch(step_id=number, started=started, items=(item,))).result()
        found += sampled.prompt_logprobs.get(0, ())
    runner.launch(Batch(step_id=0, ended=(SlotId(0),), items=())).result()
    return found


def plain_logprobs(model: Any, prompt: Sequence[int], device: str = "cpu") -> Tensor:
    """Return [len(prompt), vocab_size]: in row p the logprobs of all tokens for position p + 1."""

    def attend(_layer: int, heads: Tensor, rotary: Rotary | None) -> Tensor:
        q, k, v = (each.transpose(0, 1)[None] for each in rotated_heads(heads, rotary, model.config.num_kv_heads))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    with torch.inference_mode():
        positions = torch.arange(len(prompt), device=device)
        hidden = model.forward(torch.tensor(prompt, device=device), positions, attend)
        return model.logits(hidden).float().log_softmax(dim=-1).cpu()


def assert_scores(found: Sequence[TokenLogprobs], expected: Tensor, prompt: Sequence[int], tolerance: float) -> None:
    """Compare the logprobs of the last `len(found)` tokens of the prompt with `plain_logprobs`."""
    first = len(prompt) - len(found)
    for position, one in enumerate(found, first):
        row = expected[position - 1]
        assert abs(one.logprob - float(row[prompt[position]])) < tolerance
        assert all(
            abs(value - float(row[each])) < tolerance
            for each, value in zip(one.top_token_ids, one.top_logprobs, strict=True)
        )
        assert all(
            abs(value - float(row[each])) < tolerance
            for each, value in zip(SCORED.logprob_token_ids, one.requested_logprobs, strict=True)
        )
        best = row.topk(3).values.tolist()
        assert all(abs(value - want) < tolerance for value, want in zip(one.top_logprobs, best, strict=True))
        assert one.rank is not None
        margin = float(row[prompt[position]])
        assert int((row > margin + tolerance).sum()) < one.rank <= int((row > margin - tolerance).sum()) + 1
