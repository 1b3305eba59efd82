"""Turns a batch into the inputs of the model and of attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvist.attention.backend import Span
from kvist.plan.batch import Batch, BatchItem
from kvist.request import RequestId
from kvist.runner.sampler import SamplingRow


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardInputs:
    token_ids: Tensor  # [num_tokens], int64
    positions: Tensor  # [num_tokens], int64
    spans: tuple[Span, ...]
    sampled_rows: Tensor | None  # [num_sampled], int64: rows whose logits are needed, in item order; None: all rows


def sampling_rows(batch: Batch) -> list[SamplingRow]:
    """Return one row for each item with `sampling`, in item order."""
    return [
        SamplingRow(params=item.sampling, position=item.end, suppressed_token_ids=item.suppressed_token_ids)
        for item in batch.items
        if item.sampling is not None
    ]


def build_inputs(items: Sequence[BatchItem], previous: Mapping[RequestId, int], device: torch.device) -> ForwardInputs:
    """Build the inputs of `items`. `previous`: the sampled tokens of the previous batch, the input of items with
    `takes_sampled`."""
    num_tokens = sum(item.num_tokens for item in items)
    token_ids = np.empty(num_tokens, dtype=np.int64)
    positions = np.empty(num_tokens, dtype=np.int64)
    spans, sampled_rows = [], []
    row = 0
    for item in items:
        count = item.num_tokens
        token_ids[row : row + count] = previous[item.request_id] if item.takes_sampled else item.token_ids
        positions[row : row + count] = np.arange(item.start, item.start + count)
        spans.append(Span(start=item.start, num_tokens=count, page_ids=item.page_ids))
        row += count
        if item.sampling is not None:
            sampled_rows.append(row - 1)
    every_row = len(sampled_rows) == num_tokens
    return ForwardInputs(
        token_ids=torch.from_numpy(token_ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        spans=tuple(spans),
        sampled_rows=None if every_row else torch.tensor(sampled_rows, dtype=torch.int64, device=device),
    )
