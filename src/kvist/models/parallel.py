"""The ranks of a tensor-parallel model: a rank's share of heads and rows, and the collectives that combine results.

A head is never split. With more ranks than KV heads, each KV head is replicated on `size / num_kv_heads` ranks. Size 1
uses the same code and never calls torch.distributed. The layers are in layers.py.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from kvist.errors import ConfigError

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
                f"--tp {self.size} is neither a divisor nor a multiple of the model's {num_kv_heads} KV heads",
                param="tp",
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
