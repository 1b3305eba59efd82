"""Logprobs of tokens under the model's own distribution: before penalties, temperature and truncation.

The same function is used for the tokens that a step samples and for the tokens of a prompt. On a GPU the host does not
wait: the values are tensors until `LogprobTensors.by_row` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvist.request import TokenLogprobs


class LogprobRow(NamedTuple):
    """A row of logits whose logprobs were requested."""

    place: int  # of the row in the logits
    num_top: int  # of the likeliest tokens
    requested_token_ids: Sequence[int]  # further tokens, all in the vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobTensors:
    """Logprobs of some rows, as tensors; on a GPU their computation may be pending."""

    rows: Sequence[LogprobRow]
    of_chosen: Tensor  # [len(rows)]
    top_values: Tensor  # [len(rows), the largest num_top]
    top_ids: Tensor
    requested_values: Tensor | None  # [len(rows), the most requested ids]; None: no row has any
    ranks: Tensor | None  # [len(rows)] of the chosen tokens; None: not requested

    def start_copy(self) -> LogprobTensors:
        """Start the copy to the host. The values are valid once the stream has reached this point."""
        return replace(
            self,
            of_chosen=_to_host(self.of_chosen),
            top_values=_to_host(self.top_values),
            top_ids=_to_host(self.top_ids),
            requested_values=None if self.requested_values is None else _to_host(self.requested_values),
            ranks=None if self.ranks is None else _to_host(self.ranks),
        )

    def by_row(self) -> dict[int, TokenLogprobs]:
        """Return the logprobs by the place of their row. Waits for the tensors if they are on a GPU."""
        num_rows = len(self.rows)
        columns = zip(
            self.rows,
            self.of_chosen.tolist(),
            self.top_values.tolist(),
            self.top_ids.tolist(),
            [()] * num_rows if self.requested_values is None else self.requested_values.tolist(),
            [None] * num_rows if self.ranks is None else self.ranks.tolist(),
            strict=True,
        )
        return {
            row.place: TokenLogprobs(
                logprob=logprob,
                top_token_ids=tuple(ids[: row.num_top]),
                top_logprobs=tuple(values[: row.num_top]),
                requested_logprobs=tuple(requested[: len(row.requested_token_ids)]),
                rank=rank,
            )
            for row, logprob, values, ids, requested, rank in columns
        }


def token_logprobs(
    logits: Tensor, rows: Sequence[LogprobRow], chosen: Tensor, *, with_ranks: bool = False
) -> LogprobTensors:
    """Return the logprobs of some rows of `logits` [num_rows, vocab_size], fp32. `chosen` [num_rows]: int64 token ids
    in the vocabulary, for all rows of `logits`."""
    if len(rows) < logits.shape[0]:
        places = on_device([row.place for row in rows], torch.int64, logits.device)
        logits, chosen = logits.index_select(0, places), chosen.index_select(0, places)
    logprobs = logits.log_softmax(dim=-1)
    of_chosen = logprobs.gather(1, chosen[:, None])
    top_values, top_ids = logprobs.topk(min(max(row.num_top for row in rows), logits.shape[1]), dim=-1)
    return LogprobTensors(
        rows=rows,
        of_chosen=of_chosen.squeeze(1),
        top_values=top_values,
        top_ids=top_ids,
        requested_values=_requested(logprobs, rows),
        ranks=(logprobs > of_chosen).sum(dim=-1) + 1 if with_ranks else None,
    )


def _requested(logprobs: Tensor, rows: Sequence[LogprobRow]) -> Tensor | None:
    most = max(len(row.requested_token_ids) for row in rows)
    if not most:
        return None
    numbers: dict[tuple[int, ...], int] = {}  # the rows of a request share one list
    of_row = [numbers.setdefault(tuple(row.requested_token_ids), len(numbers)) for row in rows]
    padded = on_device([[*ids, *[0] * (most - len(ids))] for ids in numbers], torch.int64, logprobs.device)
    return logprobs.gather(1, padded.index_select(0, on_device(of_row, torch.int64, logprobs.device)))


def on_device(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy `values` to the device without waiting for the GPU, which needs pinned memory."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", non_blocking=True)
