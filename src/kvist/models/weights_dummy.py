"""Random weights of the right shapes, from a configuration alone: for benchmarks and tests that need no real model.

Each tensor depends on (seed, name) only, so every rank of every TP size, and every worker with the same seed and kind
of device, has parts of the same model. Matrices have standard deviation 1/sqrt(inputs) and norms are ones: activations
and logits stay near 1 at any depth.
"""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

from kvist.models.config import ModelConfig
from kvist.models.weights import Shape, expected_tensors


class DummySource:
    def __init__(self, config: ModelConfig, *, seed: int, device: torch.device) -> None:
        self.origin = "dummy weights"
        self.shapes: dict[str, Shape] = expected_tensors(config)
        self._seed = seed
        self._device = device

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        shape = self.shapes[name]
        if "norm" in name:
            return torch.ones(shape, device=self._device)[rows]
        generator = torch.Generator(self._device).manual_seed(
            xxhash.xxh3_64_intdigest(name.encode(), seed=self._seed) >> 1
        )
        whole = torch.randn(shape, generator=generator, device=self._device)
        if len(shape) == 1:
            return whole[rows].mul_(0.1)
        return whole[rows, columns].mul_(shape[1] ** -0.5)
