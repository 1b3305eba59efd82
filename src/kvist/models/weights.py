"""Reads declared tensors from a source, and checks that a checkpoint has exactly the declared tensors.

Each kind of source has a file: weights_safetensors.py and weights_gguf.py read checkpoints, weights_dummy.py makes
random values. `WeightReader` returns this rank's part of a tensor on the model's device. A part of a model is first
`Declared`, with the tensors that it needs; `load` reads them and makes the part.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.errors import ModelLoadError
from kvist.models.parallel import TensorParallel
from kvist.models.tensors import DeclaredTensor, Location, Part, Shape

T = TypeVar("T")


class WeightSource(Protocol):
    def read(self, tensor: DeclaredTensor, part: Part) -> Tensor:
        """Read a part of a tensor, in the dtype of the source. Called from several threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor that a checkpoint has."""

    shape: Shape
    dtype: torch.dtype  # of what `read` returns
    file: str


class CheckpointSource(WeightSource, Protocol):
    @property
    def origin(self) -> str:
        """The file that names all tensors, for error messages."""

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Every tensor of the checkpoint by name."""

    def location(self, tensor: DeclaredTensor) -> Location:
        """Return where this kind of checkpoint has the tensor."""


class WeightReader:
    """Reads this rank's parts for the layers and counts them. Safe to use from several loading threads."""

    def __init__(self, source: WeightSource, *, dtype: torch.dtype, device: torch.device, tp: TensorParallel) -> None:
        self.tp = tp
        self._source = source
        self._dtype = dtype
        self._device = device
        self._lock = threading.Lock()
        self._num_read = self._num_bytes = 0

    @property
    def num_read(self) -> int:
        return self._num_read

    @property
    def num_bytes(self) -> int:
        """The size of all parts in memory, as they were read."""
        return self._num_bytes

    def read(self, tensor: DeclaredTensor) -> Tensor:
        values = self._source.read(tensor, tensor.part(self.tp))
        missing = tensor.shape_on(self.tp)[0] - values.shape[0]
        if missing:
            values = F.pad(values, (0, 0) * (values.ndim - 1) + (0, missing))
        values = values.to(device=self._device, dtype=tensor.dtype or self._dtype)
        with self._lock:
            self._num_read += 1
            self._num_bytes += values.nbytes
        return values


@dataclass(frozen=True, slots=True)
class Declared(Generic[T]):
    """A part of a model before its weights are read."""

    tensors: tuple[DeclaredTensor, ...]  # all that `load` reads
    load: Callable[[WeightReader], T]


def check_tensors(
    source: CheckpointSource, tensors: Iterable[DeclaredTensor], *, family: str, redundant: tuple[str, ...]
) -> None:
    """Raise `ModelLoadError` that names the first missing, misshaped or unexpected tensor and its file. A checkpoint
    may also have tensors whose names end with one of `redundant`."""
    unexpected = set(source.stored)
    for tensor in tensors:
        location = source.location(tensor)
        name, shape = location.name, location.stored_shape(tensor.shape)
        unexpected.discard(name)
        found = source.stored.get(name)
        if found is None:
            raise ModelLoadError(f"{source.origin}: tensor {name} is missing; the config needs it with shape {shape}")
        if found.shape != shape:
            raise ModelLoadError(f"{found.file}: tensor {name} has shape {found.shape}; the config needs {shape}")
        if not tensor.accepts(found.dtype):
            raise ModelLoadError(f"{found.file}: tensor {name} has dtype {_short(found.dtype)}, which is not supported")
    extra = sorted(name for name in unexpected if not name.endswith(redundant))
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise ModelLoadError(f"{source.stored[extra[0]].file}: tensor {extra[0]}{more} is not part of a {family} model")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
