"""Weights of a GGUF file, dequantised by the gguf library one tensor at a time (float32 copies exist only while in
use).

llama.cpp rotates neighbouring dimensions, so files of some families store the rows of q and k of each head as rotation
pairs (0, D/2, 1, D/2+1, ...); Kvist rotates halves (rope.py), so that order is undone here.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_to_byte_shape
from numpy.typing import NDArray
from torch import Tensor

from kvist.checkpoint import Checkpoint, GgufTensor
from kvist.errors import ModelLoadError
from kvist.models.config_gguf import ROPE_DIVISORS
from kvist.models.tensors import DeclaredTensor, Location, Part
from kvist.models.weights import StoredTensor

_DEQUANTISE_BYTES = 1 << 16  # the library processes 16 rows at a time: long rows reduce its overhead


class GgufSource:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.origin = str(checkpoint.path)
        self._tensors = {
            name: tensor for name, tensor in checkpoint.gguf_header.tensors.items() if name != ROPE_DIVISORS
        }
        self.stored = {
            name: StoredTensor(shape=tensor.shape, dtype=torch.float32, file=self.origin)
            for name, tensor in self._tensors.items()
        }
        self._bytes: NDArray[np.uint8] = np.memmap(checkpoint.path, mode="r", dtype=np.uint8)

    def location(self, tensor: DeclaredTensor) -> Location:
        return tensor.gguf

    def read(self, tensor: DeclaredTensor, part: Part) -> Tensor:
        location, stored = tensor.gguf, self._tensors[tensor.gguf.name]
        rows, *columns = part
        if location.entry is not None:
            first = location.entry.index * stored.shape[1]
            rows = slice(first + rows.start, first + rows.stop)
            stored = replace(stored, shape=(math.prod(stored.shape[:2]), *stored.shape[2:]))
        raw, kind = self._raw(stored, rows)
        values = torch.from_numpy(self._dequantise(raw, kind, stored))
        if location.paired_head_dim is not None:
            values = _split_halves(values, location.paired_head_dim)
        return values[:, columns[0]].contiguous() if columns else values

    def _raw(self, tensor: GgufTensor, rows: slice) -> tuple[NDArray[np.uint8], GGMLQuantizationType]:
        """Return the stored bytes of some rows, [num_rows, row_bytes]; a vector has one element per row."""
        try:
            kind = GGMLQuantizationType(tensor.ggml_type)
            row_shape = tensor.shape[1:] if len(tensor.shape) > 1 else (1,)
            row_bytes = math.prod(quant_shape_to_byte_shape(row_shape, kind))
        except (ValueError, KeyError) as error:
            raise ModelLoadError(f"{self.origin}: tensor {tensor.name}: {error}") from error
        end = tensor.offset + tensor.shape[0] * row_bytes
        if end > self._bytes.size:
            raise ModelLoadError(f"{self.origin}: the file ends inside tensor {tensor.name}; the file is truncated")
        return self._bytes[tensor.offset : end].reshape(tensor.shape[0], row_bytes)[rows], kind

    def _dequantise(
        self, raw: NDArray[np.uint8], kind: GGMLQuantizationType, tensor: GgufTensor
    ) -> NDArray[np.float32]:
        num_rows, row_bytes = raw.shape
        whole_rows = max(1, math.gcd(num_rows, max(1, _DEQUANTISE_BYTES // row_bytes)))
        try:
            values = dequantize(raw.reshape(num_rows // whole_rows, -1), kind)
        except NotImplementedError as error:
            raise ModelLoadError(f"{self.origin}: tensor {tensor.name}: {error}") from error
        shaped: NDArray[np.float32] = np.array(values, dtype=np.float32).reshape(num_rows, *tensor.shape[1:])
        return shaped


def _split_halves(values: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head from (0, D/2, 1, D/2+1, ...) to (0, 1, ..., D-1)."""
    heads = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return heads.transpose(1, 2).reshape(values.shape)
