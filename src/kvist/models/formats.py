"""A weight is a value with a format: plain today, with room for scales and packed values.

A format is a function from a matrix, declared as if it were plain, to a `Declared` weight: the tensors that a
checkpoint has instead of it (values, scales, zero points), each with its own shape, dtype and split over the ranks, and
how a `Weight` is made of them. Every format has a class of weights, and linear.py a product for each class; no other
code looks into a weight. To add a format: one file with these two and an entry in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from kvist.models.tensors import DeclaredTensor
from kvist.models.weights import Declared, WeightReader


class Weight(Protocol):
    """This rank's part of a matrix, [out_features, in_features], in any format. Shape, size and split are declared: no
    weight is measured or cut after it was read."""

    def joined(self, others: Sequence[Self]) -> Self:
        """Return one weight with the rows of this one and then those of `others`: the weight of a fused product."""


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """The values themselves, in the dtype of the product."""

    values: Tensor  # [out_features, in_features]

    def joined(self, others: Sequence[PlainWeight]) -> PlainWeight:
        return PlainWeight(torch.cat([self.values, *(other.values for other in others)])) if others else self


WeightFormat = Callable[[DeclaredTensor], Declared[Weight]]


def plain(matrix: DeclaredTensor) -> Declared[Weight]:
    def load(reader: WeightReader) -> Weight:
        return PlainWeight(reader.read(matrix))

    return Declared((matrix,), load)


FORMATS: dict[str, WeightFormat] = {"plain": plain}  # by `ModelConfig.weight_format`
