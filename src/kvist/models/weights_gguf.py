"""Weights of a GGUF file, dequantised by the gguf library one tensor at a time (float32 copies exist only while in
use).

Llama files store the rows of q and k of each head as rotation pairs (0, D/2, 1, D/2+1, ...), because llama.cpp rotates
neighbouring dimensions; Kvist rotates halves (rope.py), so that order is undone here. Qwen files store the halves.
"""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_to_byte_shape
from numpy.typing import NDArray
from torch import Tensor

from kvist.checkpoint import Checkpoint, GgufTensor
from kvist.errors import ModelLoadError
from kvist.models.config import ModelConfig
from kvist.models.config_gguf import ROPE_DIVISORS
from kvist.models.family import family_named
from kvist.models.weights import Shape

_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<stem>\w+)\.(?P<kind>weight|bias)")
_DEQUANTISE_BYTES = 1 << 16  # the library processes 16 rows at a time: long rows reduce its overhead


def hf_name(gguf_name: str) -> str:
    """Return the Hugging Face name. An unknown name is returned unchanged and later reported as unexpected."""
    match = _NAME.fullmatch(gguf_name)
    if match is None:
        return gguf_name
    if match["layer"] is None:
        stem = _ENDS.get(match["stem"])
        return gguf_name if stem is None else f"{stem}.{match['kind']}"
    stem = _LAYER.get(match["stem"])
    return gguf_name if stem is None else f"model.layers.{match['layer']}.{stem}.{match['kind']}"


class GgufSource:
    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        path, header = checkpoint.path, checkpoint.gguf_header
        self.origin = str(path)
        self._tensors = {hf_name(name): tensor for name, tensor in header.tensors.items() if name != ROPE_DIVISORS}
        self.shapes: dict[str, Shape] = {name: tensor.shape for name, tensor in self._tensors.items()}
        self._bytes: NDArray[np.uint8] = np.memmap(path, mode="r", dtype=np.uint8)
        self._head_dim = config.head_dim
        self._interleaved = family_named(config.family, field="family", origin=str(path)).gguf_interleaves_rotation

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        tensor = self._tensors[name]
        raw, kind = self._raw(tensor, rows)
        values = torch.from_numpy(self._dequantise(raw, kind, tensor))
        if self._interleaved and (".q_proj." in name or ".k_proj." in name):
            values = self._split_halves(values)
        return values[:, columns].contiguous() if values.ndim > 1 else values

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

    def _split_halves(self, values: Tensor) -> Tensor:
        """Reorder the rows of each head from (0, D/2, 1, D/2+1, ...) to (0, 1, ..., D-1)."""
        heads = values.reshape(-1, self._head_dim // 2, 2, *values.shape[1:])
        return heads.transpose(1, 2).reshape(values.shape)
