"""Turns a batch into the inputs of the model and of attention, for the runner on CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvist.attention.backend import Span
from kvist.plan.batch import BatchItem
from kvist.runner.sampler import SamplingRow
from kvist.runner.slots import SlotTable


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardInputs:
    token_ids: Tensor  # [num_tokens], int64
    positions: Tensor  # [num_tokens], int64
    spans: tuple[Span, ...]
    sampled_rows: Tensor | None  # [num_sampled], int64: rows whose logits are needed, in item order; None: all rows


def sampling_rows(items: Sequence[BatchItem], table: SlotTable) -> list[SamplingRow]:
    """Return one row for each item with `samples`, in item order."""
    return [table.sampling.row(item.slot, item.end) for item in items if item.samples]


def build_inputs(items: Sequence[BatchItem], last_tokens: npt.NDArray[np.int64], device: torch.device) -> ForwardInputs:
    """Build the inputs of `items`. `last_tokens` [num_slots]: the token sampled last in each slot, the input of items
    with `takes_sampled`."""
    num_tokens = sum(item.num_tokens for item in items)
    token_ids = np.empty(num_tokens, dtype=np.int64)
    positions = np.empty(num_tokens, dtype=np.int64)
    spans, sampled_rows = [], []
    row = 0
    for item in items:
        count = item.num_tokens
        token_ids[row : row + count] = last_tokens[item.slot] if item.takes_sampled else item.token_ids
        positions[row : row + count] = np.arange(item.start, item.start + count)
        spans.append(Span(start=item.start, num_tokens=count, page_ids=item.page_ids))
        row += count
        if item.samples:
            sampled_rows.append(row - 1)
    every_row = len(sampled_rows) == num_tokens
    return ForwardInputs(
        token_ids=torch.from_numpy(token_ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        spans=tuple(spans),
        sampled_rows=None if every_row else torch.tensor(sampled_rows, dtype=torch.int64, device=device),
    )
