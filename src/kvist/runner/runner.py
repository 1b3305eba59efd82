"""Carries out one batch: tensors in, tokens out.

Owns the model, the page pool and the attention over it, and on a tensor-parallel engine the follower ranks. A batch is
carried out whole before the next one; what is computed depends on the pages and the batch alone, so a step may be
repeated. It does not know requests beyond the batch: who runs, in which pages and until when is the scheduler's.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvist.attention.backend import Attend, AttentionBackend
from kvist.kv.device import DevicePool
from kvist.request import RequestId, SampledToken
from kvist.runner.inputs import ForwardInputs, ForwardItem, build_inputs, forward_items, sampling_rows
from kvist.runner.sampler import sample
from kvist.scheduler.plan import Batch


class Model(Protocol):
    """What a runner needs of `models.CausalLM`."""

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class Followers(Protocol):
    """The other ranks of a tensor-parallel engine (tp.py)."""

    def broadcast(self, items: list[ForwardItem]) -> None: ...

    def check_alive(self) -> None: ...

    def close(self) -> None: ...


class Runner:
    def __init__(
        self,
        *,
        model: Model,
        pool: DevicePool,
        attention: AttentionBackend,
        pool_reason: str = "",
        followers: Followers | None = None,
    ) -> None:
        """`attention` is bound to the pool (on a tensor-parallel engine: to rank 0's heads of it)."""
        self.pool = pool
        self.pool_reason = pool_reason  # what set the pool's size, for the log
        self.attention_name = attention.name
        self._model = model
        self._attention = attention
        self._device = pool.tensor.device
        self._followers = followers

    def execute(self, batch: Batch) -> dict[RequestId, SampledToken]:
        """Write the K/V of every token of the batch; one new token for each item that has `sampling`.

        Raises `EngineError` when a follower rank is gone; any other exception is a broken device or our bug.
        """
        assert batch.items, "an empty batch is no batch"
        items = forward_items(batch)
        with torch.inference_mode():
            logits = self._forward(items)
            if logits is None:
                return {}
            tokens = sample(logits, sampling_rows(batch))
        sampled = (item.request_id for item in batch.items if item.sampling is not None)
        return dict(zip(sampled, tokens, strict=True))

    def _forward(self, items: list[ForwardItem]) -> Tensor | None:
        if self._followers is None:
            return forward(self._model, self._attention, build_inputs(items, self._device))
        self._followers.broadcast(items)
        try:
            return forward(self._model, self._attention, build_inputs(items, self._device))
        except RuntimeError:  # torch.distributed's word for a peer that is gone, too
            self._followers.check_alive()
            raise

    def close(self) -> None:
        """Let the follower ranks go and drop the pool."""
        if self._followers is not None:
            self._followers.close()
        self.pool.close()


def forward(model: Model, attention: AttentionBackend, inputs: ForwardInputs) -> Tensor | None:
    """[num_sampled, vocab_size] fp32 logits, or None when no row wants a token. Runs on every rank."""
    hidden = model.forward(inputs.token_ids, inputs.positions, attention.prepare(inputs.spans))
    if inputs.sampled_rows is None:
        return model.logits(hidden)
    if not len(inputs.sampled_rows):
        return None
    return model.logits(hidden[inputs.sampled_rows])
