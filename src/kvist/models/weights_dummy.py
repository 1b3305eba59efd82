"""Random weights of the declared shapes, from a configuration alone: for benchmarks and tests that need no real model.

Each tensor depends on (seed, name) only, so every rank of every TP size, and every worker with the same seed and kind
of device, has parts of the same model. Matrices have standard deviation 1/sqrt(inputs) and norms are ones: activations
and logits stay near 1 at any depth.
"""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

from kvist.models.tensors import DeclaredTensor, Fill, Part


class DummySource:
    def __init__(self, *, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device

    def read(self, tensor: DeclaredTensor, part: Part) -> Tensor:
        shape = tensor.shape
        if tensor.fill is Fill.ONES:
            return torch.ones(shape, device=self._device)[part]
        name = tensor.hf.name if tensor.hf.entry is None else f"{tensor.hf.name}[{tensor.hf.entry.index}]"
        generator = torch.Generator(self._device).manual_seed(
            xxhash.xxh3_64_intdigest(name.encode(), seed=self._seed) >> 1
        )
        whole = torch.randn(shape, generator=generator, device=self._device)
        return whole[part].mul_(0.1 if len(shape) == 1 else shape[1] ** -0.5)
