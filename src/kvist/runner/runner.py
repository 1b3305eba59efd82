"""Carries out one batch: tensors in, tokens out.

Owns the model, the page pool and the attention over it, and on a tensor-parallel engine the follower ranks. `launch`
begins a batch, `InFlight.result` waits for its tokens; batches are carried out in the order of their launches. On a
CPU, which this file is for, `launch` does all the work; cuda_runner.py is the GPU's.

What is computed depends on the pages and the batch alone, and with `takes_sampled` on the tokens of the batch before.
It does not know requests beyond that: who runs, in which pages and until when is the scheduler's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvist.attention.backend import Attend, AttentionBackend
from kvist.kv.device import DevicePool
from kvist.models.decoder import Unfinished
from kvist.request import RequestId, SampledToken
from kvist.runner.inputs import ForwardInputs, ForwardItem, build_inputs, forward_items, sampling_rows
from kvist.runner.sampler import sample
from kvist.scheduler.plan import Batch


class Model(Protocol):
    """What a runner needs of `models.CausalLM`."""

    def begin(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Unfinished: ...

    def finish(self, unfinished: Unfinished) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class Followers(Protocol):
    """The other ranks of a tensor-parallel engine (tp.py)."""

    def broadcast(self, items: list[ForwardItem]) -> None: ...

    def check_alive(self) -> None: ...

    def close(self) -> None: ...


class InFlight(Protocol):
    """A batch that was launched."""

    def result(self) -> Mapping[RequestId, SampledToken]:
        """Waits until the K/V of every token of the batch is in the pages; one new token for each item that has
        `sampling`. Raises what the device raised. Once, and in the order of the launches."""
        ...


class AnyRunner(Protocol):
    """What an engine needs of the runner for its device."""

    pool: DevicePool
    pool_reason: str  # what set the pool's size, for the log
    attention_name: str

    def launch(self, batch: Batch) -> InFlight: ...

    def execute(self, batch: Batch) -> Mapping[RequestId, SampledToken]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Finished:
    """Was computed by the launch already."""

    tokens: Mapping[RequestId, SampledToken]

    def result(self) -> Mapping[RequestId, SampledToken]:
        return self.tokens


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
        self.pool_reason = pool_reason
        self.attention_name = attention.name
        self._model = model
        self._attention = attention
        self._device = pool.tensor.device
        self._followers = followers
        self._former: Mapping[RequestId, SampledToken] = {}  # of the batch before

    def launch(self, batch: Batch) -> InFlight:
        """Raises `EngineError` when a follower rank is gone; any other exception is a broken device or our bug."""
        assert batch.items, "an empty batch is no batch"
        items = forward_items(batch, self._former)
        self._former = {}
        with torch.inference_mode():
            logits = self._forward(items)
            if logits is None:
                return Finished({})
            tokens = sample(logits, sampling_rows(batch))
        sampled = (item.request_id for item in batch.items if item.sampling is not None)
        self._former = dict(zip(sampled, tokens, strict=True))
        return Finished(self._former)

    def execute(self, batch: Batch) -> Mapping[RequestId, SampledToken]:
        return self.launch(batch).result()

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
    unfinished = model.begin(inputs.token_ids, inputs.positions, attention.prepare(inputs.spans))
    if inputs.sampled_rows is not None:
        if not len(inputs.sampled_rows):
            return None
        unfinished = unfinished.select(inputs.sampled_rows)
    return model.logits(model.finish(unfinished))
