"""Runs one batch: tensors in, tokens out.

Owns the model, the page pool and the attention over the pool; on a tensor-parallel engine, one rank's part of them
(leader.py coordinates the ranks). `launch` begins a batch, `LaunchedBatch.result` waits for its tokens; batches run in
the order of their launches. This file is the runner for CPUs, where `launch` does all the work; cuda_runner.py is for
GPUs.

The result depends only on the pages, the batch and the slots of its requests (slots.py): their parameters and tokens so
far. The scheduler decides which requests run, in which pages and until when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvist.attention.backend import Attend, AttentionBackend
from kvist.kernels.operands import Rotary
from kvist.memory.device_pool import DevicePool
from kvist.models.decoder import PartialForward
from kvist.plan.batch import Batch
from kvist.plan.events import SampledTokens
from kvist.runner.answers import errors_of
from kvist.runner.inputs import ForwardInputs, build_inputs, sampling_rows
from kvist.runner.prompt_scores import ScoredRows, score_prompts
from kvist.runner.sampler import sample
from kvist.runner.slots import SlotTable


class Model(Protocol):
    """The part of `models.CausalLM` that a runner uses."""

    def begin_forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> PartialForward: ...

    def finish_forward(self, unfinished: PartialForward) -> Tensor: ...

    def barrier(self, unfinished: PartialForward) -> None: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class LaunchedBatch(Protocol):
    """A batch that was launched."""

    def is_done(self) -> bool:
        """Return whether `result` would return at once. May raise the error that `result` raises."""

    def wait(self) -> None:
        """Wait until `is_done`. May be called by another thread, also while the batch is read. May raise the error that
        `result` raises."""

    def result(self) -> SampledTokens:
        """Wait until the K/V of every token of the batch is in the pages, on all ranks, and return the sampled tokens.
        Raises an error of the device. Called once per batch, in the order of the launches."""


class AnyRunner(Protocol):
    """The interface between engine and runner, the same for every device."""

    pool: DevicePool
    pool_reason: str  # for the log: the size of the pool, and the limit that set it
    attention_name: str

    def launch(self, batch: Batch) -> LaunchedBatch: ...

    def close(self) -> None: ...


class RankRunner(AnyRunner, Protocol):
    """The runner of one rank."""

    def settle(self) -> None:
        """Choose the tokens of the newest batch, if this needs the tokens of the batch before, and wait for that batch.
        To read the batch before does the same; a rank that reads no results settles each batch."""


@dataclass(frozen=True, slots=True)
class FinishedBatch:
    """A batch whose result was computed by `launch`."""

    sampled: SampledTokens

    def is_done(self) -> bool:
        return True

    def wait(self) -> None: ...

    def result(self) -> SampledTokens:
        return self.sampled


class Runner:
    def __init__(
        self, *, model: Model, pool: DevicePool, attention: AttentionBackend, table: SlotTable, pool_reason: str = ""
    ) -> None:
        """`attention` must be bound to the pool (on a tensor-parallel engine, to this rank's heads of the pool)."""
        self.pool = pool
        self.pool_reason = pool_reason
        self.attention_name = attention.name
        self.model = model
        self._attention = attention
        self._device = pool.tensor.device
        self._table = table
        self._last_tokens = np.zeros(table.num_slots, dtype=np.int64)  # by slot
        self.between_layers: Callable[[], None] | None = None  # an exception from it ends the step

    def launch(self, batch: Batch) -> LaunchedBatch:
        """Run the batch; a batch without items only ends and starts requests. An exception means a broken device or a
        bug, unless `between_layers` raised it."""
        self._table.update(batch)
        if not batch.items:
            return FinishedBatch(SampledTokens(token_ids=()))
        assert all(item.slot in self._table.open_slots for item in batch.items), "an item's slot is not open"
        answers = self._table.answers
        answers.accept_known(batch.items)
        with torch.inference_mode():
            inputs = build_inputs(batch.items, self._last_tokens, self._device)
            unfinished = begin(self.model, self._attention, inputs, self.between_layers)
            scored = ScoredRows.of(batch.items, self._table.scoring)
            scores = {} if scored is None else score_prompts(self.model, unfinished, scored).by_item()
            logits = finish(self.model, unfinished, inputs)
            if logits is None:
                return FinishedBatch(SampledTokens(token_ids=(), prompt_logprobs=scores))
            slots = [item.slot for item in batch.items if item.samples]
            followed = answers.followed(batch.items)
            self._table.shaping.before_choice(batch.items, followed)
            sampled = sample(logits, sampling_rows(batch.items, self._table), self._table.shaping.rows(slots))
        # 0 for a request that got no token: the request fails, and results computed from the 0 are dropped
        self._last_tokens[slots] = np.maximum(sampled.token_ids, 0)
        answers.read(followed, sampled.token_ids)
        reasons = errors_of(followed) if sampled.invalid_rows else {}
        following = answers.take_forced(followed)
        if scores or reasons or following:
            sampled = replace(sampled, prompt_logprobs=scores, constraint_errors=reasons, following=following)
        return FinishedBatch(sampled)

    def settle(self) -> None:
        """See `RankRunner.settle`. A launch has done all the work."""

    def close(self) -> None:
        """Drop the pool."""
        self.pool.close()


def begin(
    model: Model,
    attention: AttentionBackend,
    inputs: ForwardInputs,
    between_layers: Callable[[], None] | None = None,
) -> PartialForward:
    attend = attention.prepare(inputs.spans)
    if between_layers is not None:
        attend = _with_callback(attend, between_layers)
    return model.begin_forward(inputs.token_ids, inputs.positions, attend)


def finish(model: Model, unfinished: PartialForward, inputs: ForwardInputs) -> Tensor | None:
    """Return logits [num_sampled, vocab_size] in fp32, or None when no row needs a token. May change `unfinished`."""
    if inputs.sampled_rows is not None:
        if not len(inputs.sampled_rows):
            model.barrier(unfinished)
            return None
        unfinished = unfinished.select(inputs.sampled_rows)
    return model.logits(model.finish_forward(unfinished))


def _with_callback(attend: Attend, between_layers: Callable[[], None]) -> Attend:
    def attend_after_callback(layer: int, heads: Tensor, rotary: Rotary | None) -> Tensor:
        between_layers()
        return attend(layer, heads, rotary)

    return attend_after_callback
