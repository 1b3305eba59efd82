"""Tensor parallelism: which part of each matrix a rank has, and the layers that combine the parts.

Columns-then-rows, as in Megatron-LM (https://arxiv.org/abs/1909.08053): q, k, v, gate and up are split by output rows;
o and down by input columns, followed by one all-reduce; the vocabulary is split by rows in the embedding and the head.
A head is never split. With more ranks than KV heads, each KV head is replicated on `size / num_kv_heads` ranks.

Size 1 uses the same code and never calls torch.distributed.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from kvist.errors import ConfigError
from kvist.models.linear import Linear, make_gated_linear, make_linear
from kvist.models.weights import WeightReader

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallel:
    """One rank and its group. `group` None: torch.distributed's default group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place; every rank gets the same bits."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x [num_rows, n] of each rank -> [num_rows, n * size], in rank order."""
        if self.size == 1:
            return x
        num_rows, n = x.shape
        parts = x.new_empty((self.size * num_rows, n))
        _gather(parts, x.contiguous(), group=self.group)
        return parts.view(self.size, num_rows, n).transpose(0, 1).reshape(num_rows, self.size * n)

    def shard(self, total: int, what: str) -> slice:
        """Return this rank's [start, stop) of `total` items. Raises `ConfigError` when the ranks do not divide
        `total`."""
        if total % self.size:
            raise ConfigError(f"--tp {self.size} does not divide the model's {total} {what}", param="tp")
        count = total // self.size
        return slice(self.rank * count, (self.rank + 1) * count)

    def kv_heads(self, num_kv_heads: int) -> slice:
        """Return this rank's KV heads: its shard of them, or one head that is replicated on neighbouring ranks."""
        if self.size <= num_kv_heads:
            return self.shard(num_kv_heads, "KV heads")
        if self.size % num_kv_heads:
            raise ConfigError(
                f"--tp {self.size} is above the model's {num_kv_heads} KV heads and not a multiple of that", param="tp"
            )
        head = self.rank // (self.size // num_kv_heads)
        return slice(head, head + 1)


def join_tensor_parallel(
    *, rank: int, size: int, store: Store, device: torch.device, timeout_s: float
) -> TensorParallel:
    """Join the other ranks through `store`: a collective, all ranks call it. The backend is NCCL for a GPU `device`,
    else gloo."""
    if size > 1:
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=device if on_gpu else None,  # NCCL connects at once, not under the first capture
        )
    return TensorParallel(rank=rank, size=size)


def leave_tensor_parallel(*, abort: bool = False) -> None:
    """Leave the group: a collective, unless `abort`. With `abort`, running collectives on a GPU are aborted and their
    results are undefined."""
    if not dist.is_initialized():
        return
    if abort and dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def column_parallel(reader: WeightReader, rows: Mapping[str, slice], *, bias: bool) -> Linear:
    """Make a linear layer split by output rows; several projections of one input are fused into one product (q+k+v).

    `rows`: matrices of the checkpoint, without .weight or .bias, and the output rows of each that this rank computes.
    x [T, in_features] -> [T, this rank's rows of all matrices]."""
    weights = [reader.read(f"{name}.weight", part) for name, part in rows.items()]
    biases = [reader.read(f"{name}.bias", part) for name, part in rows.items()] if bias else None
    return make_linear(torch.cat(weights), None if biases is None else torch.cat(biases))


def gated_parallel(reader: WeightReader, rows: Mapping[str, slice]) -> Linear:
    """Make gate and up, split by output rows. x [T, in_features] -> SiLU(gate) * up [T, this rank's rows of gate]."""
    return make_gated_linear(torch.cat([reader.read(f"{name}.weight", part) for name, part in rows.items()]))


class RowParallelLinear:
    """A linear layer split by input columns; the partial products are summed over ranks."""

    def __init__(self, reader: WeightReader, name: str, columns: slice, tp: TensorParallel, *, bias: bool) -> None:
        weight = reader.read(f"{name}.weight", slice(None), columns)
        # the bias is added once to the sum, so only rank 0 adds it
        own_bias = reader.read(f"{name}.bias") if bias and tp.rank == 0 else None
        self._linear = make_linear(weight, own_bias)
        self._tp = tp

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, this rank's columns] -> [T, out_features], the same on every rank."""
        return self._tp.all_reduce(self._linear(x))


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """Rows [start, stop) of the vocabulary; the shard of the last rank is padded with zeros to `num_rows`."""

    start: int
    stop: int
    num_rows: int

    @classmethod
    def of(cls, vocab_size: int, tp: TensorParallel) -> VocabShard:
        num_rows = -(-vocab_size // tp.size)
        start = min(tp.rank * num_rows, vocab_size)
        return cls(start=start, stop=min(start + num_rows, vocab_size), num_rows=num_rows)

    def read(self, reader: WeightReader, name: str) -> Tensor:
        weight = reader.read(name, slice(self.start, self.stop))
        missing = self.num_rows - weight.shape[0]
        return F.pad(weight, (0, 0, 0, missing)) if missing else weight


class VocabParallelEmbedding:
    def __init__(self, weight: Tensor, shard: VocabShard, tp: TensorParallel) -> None:
        self._weight = weight  # [shard.num_rows, hidden_size]
        self._shard = shard
        self._tp = tp

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int64 -> [T, hidden_size]."""
        if self._tp.size == 1:
            return F.embedding(token_ids, self._weight)
        foreign = (token_ids < self._shard.start) | (token_ids >= self._shard.stop)
        local_ids = (token_ids - self._shard.start).masked_fill(foreign, 0)
        rows = F.embedding(local_ids, self._weight).masked_fill(foreign.unsqueeze(1), 0.0)
        return self._tp.all_reduce(rows)


class VocabParallelHead:
    def __init__(self, weight: Tensor, vocab_size: int, tp: TensorParallel) -> None:
        self._linear = make_linear(weight, out_dtype=torch.float32)
        self._vocab_size = vocab_size
        self._tp = tp

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size] -> logits [R, vocab_size] fp32, complete on every rank."""
        return self._tp.all_gather(self._linear(hidden))[:, : self._vocab_size].float()
