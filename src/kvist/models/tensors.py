"""The declaration of a tensor: where a checkpoint has it, its axes, and how each axis is split over the ranks.

Sizes, dummy weights, the checks of a checkpoint and the parts that a rank reads all follow from declarations: a layer
declares its tensors once (layers.py, decoder.py), and no other place knows their names or shapes.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from kvist.models.parallel import TensorParallel

Shape = tuple[int, ...]
Part = tuple[slice, ...]  # of a tensor: one [start, stop) per axis
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # reading converts them into each other


class Axis(Protocol):
    """One axis of a tensor, and this rank's part of it."""

    @property
    def length(self) -> int:
        """The length in the checkpoint."""

    def part(self, tp: TensorParallel) -> slice:
        """Return this rank's [start, stop). Raises `ConfigError` when the axis cannot be split over the ranks."""

    def length_on(self, tp: TensorParallel) -> int:
        """Return the length of this rank's part in memory, padding included."""


@dataclass(frozen=True, slots=True)
class Whole:
    """An axis that every rank holds whole."""

    length: int

    def part(self, tp: TensorParallel) -> slice:  # noqa: ARG002
        return slice(0, self.length)

    def length_on(self, tp: TensorParallel) -> int:  # noqa: ARG002
        return self.length


@dataclass(frozen=True, slots=True)
class Shards:
    """An axis of `count` items of `size` elements each; the ranks have equal numbers of items."""

    count: int
    what: str  # name of the items, for the error of a TP size that does not divide `count`
    size: int = 1

    @property
    def length(self) -> int:
        return self.count * self.size

    def items(self, tp: TensorParallel) -> slice:
        return tp.shard(self.count, self.what)

    def part(self, tp: TensorParallel) -> slice:
        return _scaled(self.items(tp), self.size)

    def length_on(self, tp: TensorParallel) -> int:
        return _length(self.part(tp))


@dataclass(frozen=True, slots=True)
class KvHeads:
    """An axis of `count` KV heads of `size` elements each. With more ranks than heads, neighbouring ranks hold the same
    head."""

    count: int
    size: int

    @property
    def length(self) -> int:
        return self.count * self.size

    def heads(self, tp: TensorParallel) -> slice:
        return tp.kv_heads(self.count)

    def part(self, tp: TensorParallel) -> slice:
        return _scaled(self.heads(tp), self.size)

    def length_on(self, tp: TensorParallel) -> int:
        return _length(self.part(tp))


@dataclass(frozen=True, slots=True)
class PaddedShards:
    """An axis of any length, such as the vocabulary: the ranks have equal lengths in memory, with zeros after the last
    element of the checkpoint."""

    length: int

    def part(self, tp: TensorParallel) -> slice:
        start = min(tp.rank * self.length_on(tp), self.length)
        return slice(start, min(start + self.length_on(tp), self.length))

    def length_on(self, tp: TensorParallel) -> int:
        return -(-self.length // tp.size)


@dataclass(frozen=True, slots=True)
class Entry:
    """The place of a tensor in a stack of `count` tensors of its shape, [count, *shape]."""

    index: int
    count: int


@dataclass(frozen=True, slots=True)
class Location:
    """Where one kind of checkpoint has a tensor, and in which form."""

    name: str
    entry: Entry | None = None  # None: the tensor is stored by itself
    # Rows of a head, if each head's rows are stored as rotation pairs (0, D/2, 1, D/2+1, ...). None: rows are in order.
    paired_head_dim: int | None = None

    def suffixed(self, suffix: str) -> Location:
        return replace(self, name=self.name + suffix)

    def stored_shape(self, shape: Shape) -> Shape:
        return shape if self.entry is None else (self.entry.count, *shape)


class Fill(enum.Enum):
    """The values of dummy weights."""

    RANDOM = enum.auto()
    ONES = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredTensor:
    """A vector or matrix of a checkpoint."""

    hf: Location
    gguf: Location
    axes: tuple[Axis, ...]  # rows first: [out_features, in_features]
    dtype: torch.dtype | None = None  # in memory; None: the model's
    fill: Fill = Fill.RANDOM

    @property
    def shape(self) -> Shape:
        return tuple(axis.length for axis in self.axes)

    def part(self, tp: TensorParallel) -> Part:
        """Return what this rank reads. Raises `ConfigError` when the ranks cannot share the tensor."""
        return tuple(axis.part(tp) for axis in self.axes)

    def shape_on(self, tp: TensorParallel) -> Shape:
        """Return the shape of this rank's part in memory."""
        return tuple(axis.length_on(tp) for axis in self.axes)

    def num_bytes_on(self, tp: TensorParallel, model_dtype: torch.dtype) -> int:
        return math.prod(self.shape_on(tp)) * (self.dtype or model_dtype).itemsize

    def accepts(self, stored: torch.dtype) -> bool:
        """Return whether values of this dtype can be read: any float for a float, otherwise the same dtype."""
        return stored in FLOATS if self.dtype is None or self.dtype in FLOATS else stored is self.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The name of a linear or norm in each kind of checkpoint, without .weight or .bias."""

    hf: Location
    gguf: Location

    def matrix(self, rows: Axis, columns: Axis) -> DeclaredTensor:
        return self._tensor(".weight", (rows, columns))

    def bias(self, rows: Axis) -> DeclaredTensor:
        return self._tensor(".bias", (rows,))

    def norm(self, length: int) -> DeclaredTensor:
        return replace(self._tensor(".weight", (Whole(length),)), fill=Fill.ONES)

    def _tensor(self, suffix: str, axes: tuple[Axis, ...]) -> DeclaredTensor:
        return DeclaredTensor(hf=self.hf.suffixed(suffix), gguf=self.gguf.suffixed(suffix), axes=axes)


def _scaled(items: slice, size: int) -> slice:
    return slice(items.start * size, items.stop * size)


def _length(part: slice) -> int:
    return int(part.stop - part.start)
