"""Scores the tokens of prompts: their logprobs under the model, given the tokens before them.

A token's logprobs are computed from the row of the token before it. The logits of a whole prompt would need gigabytes;
they are therefore computed for `_SLICE_ROWS` rows at a time, and only the requested logprobs are kept. On a
tensor-parallel engine each slice needs collectives, so all ranks must compute the same number of slices: it follows
from the batch, which all ranks have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvist.models.decoder import PartialForward
from kvist.plan.batch import BatchItem, StartRequest
from kvist.request import SamplingParams, SlotId, TokenLogprobs
from kvist.runner.logprobs import LogprobRow, LogprobTensors, on_device, token_logprobs

_SLICE_ROWS = 256  # 150 MB of logits for a vocabulary of 150,000 tokens


class SlotScoring:
    """A `SlotState` (slots.py): the parameters of requests whose prompts are scored. Nearly always empty."""

    def __init__(self) -> None:
        self.params: dict[SlotId, SamplingParams] = {}

    def open(self, start: StartRequest) -> None:
        if start.sampling.prompt_logprobs is not None:
            self.params[start.slot] = start.sampling

    def close(self, slot: SlotId) -> None:
        self.params.pop(slot, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRows:
    """The rows of a batch whose next token is scored."""

    rows: npt.NDArray[np.int64]  # of the batch's tokens
    token_ids: list[int]  # the scored tokens
    requested: list[tuple[int, Sequence[int]]]  # of each row: the number of likeliest tokens, and further tokens
    counts: dict[int, int]  # item index → number of its scored rows, for items that have any

    @classmethod
    def of(cls, items: Sequence[BatchItem], scoring: SlotScoring) -> ScoredRows | None:
        """Return the scored rows of the items; None if there are none."""
        if not scoring.params:
            return None
        rows: list[npt.NDArray[np.int64]] = []
        token_ids: list[int] = []
        requested: list[tuple[int, Sequence[int]]] = []
        counts: dict[int, int] = {}
        first_row = 0
        for index, item in enumerate(items):
            if item.score_from is not None:
                params, count = scoring.params[item.slot], len(item.scored_token_ids)
                assert params.prompt_logprobs is not None
                row = first_row + item.score_from - 1 - item.start
                assert first_row <= row <= first_row + item.num_tokens - count, "the item has the tokens before"
                rows.append(np.arange(row, row + count))
                token_ids += item.scored_token_ids
                requested += [(params.prompt_logprobs, params.logprob_token_ids)] * count
                counts[index] = count
            first_row += item.num_tokens
        return cls(rows=np.concatenate(rows), token_ids=token_ids, requested=requested, counts=counts) if rows else None


class Head(Protocol):
    """The part of a model after its last attention."""

    def finish_forward(self, unfinished: PartialForward) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """Logprobs of a batch's prompt tokens; on a GPU their computation may be pending."""

    slices: Sequence[LogprobTensors]
    counts: dict[int, int]  # as in `ScoredRows`

    def start_copy(self) -> PromptScores:
        """Start the copy to the host. The values are valid once the stream has reached this point."""
        return replace(self, slices=[each.start_copy() for each in self.slices])

    def by_item(self) -> dict[int, tuple[TokenLogprobs, ...]]:
        """Return the logprobs of each item's scored tokens, by item index."""
        found = [logprobs for each in self.slices for logprobs in each.by_row().values()]
        by_item: dict[int, tuple[TokenLogprobs, ...]] = {}
        first = 0
        for index, count in self.counts.items():
            by_item[index] = tuple(found[first : first + count])
            first += count
        return by_item


def score_prompts(head: Head, unfinished: PartialForward, scored: ScoredRows) -> PromptScores:
    """Compute the logprobs of the scored tokens, slice by slice."""
    device = unfinished.residual.device
    slices = []
    for first in range(0, len(scored.token_ids), _SLICE_ROWS):
        part = slice(first, first + _SLICE_ROWS)
        rows = on_device(scored.rows[part].tolist(), torch.int64, device)
        logits = head.logits(head.finish_forward(unfinished.select(rows)))
        chosen = on_device(scored.token_ids[part], torch.int64, device)
        wanted = [LogprobRow(place, *requested) for place, requested in enumerate(scored.requested[part])]
        slices.append(token_logprobs(logits, wanted, chosen, with_ranks=True))
    return PromptScores(slices=slices, counts=scored.counts)
