"""The interface to a checkpoint's tensors, and the checks that every checkpoint passes before its first read.

Names are those of Hugging Face folders; weights_gguf.py translates GGUF names. `WeightSource` is the interface, with
one file per format; `WeightReader` returns exactly the part that a layer asks for, in the model's dtype on its device.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from kvist.errors import ModelLoadError
from kvist.models.config import ModelConfig

Shape = tuple[int, ...]
WHOLE = slice(None)


class WeightSource(Protocol):
    @property
    def origin(self) -> str:
        """The file or folder, for error messages."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of every tensor of the checkpoint."""

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        """Read a part of one tensor, in any float dtype; `columns` is WHOLE for vectors. Called from two threads."""


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Return every tensor that the model needs, by name, with its unsplit shape."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer_tensors(config).items()}
    return shapes


def _layer_tensors(config: ModelConfig) -> dict[str, Shape]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_rows, hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.o_proj.weight": (hidden, q_rows),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.attention_bias:
        shapes |= {"self_attn.q_proj.bias": (q_rows,)}
        shapes |= {"self_attn.k_proj.bias": (kv_rows,), "self_attn.v_proj.bias": (kv_rows,)}
    if config.attention_output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if config.qk_norm:
        shapes |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    return shapes


def check_tensors(source: WeightSource, config: ModelConfig) -> None:
    """Raise `ModelLoadError` that names the first missing, misshaped or unexpected tensor."""
    expected = expected_tensors(config)
    for name, shape in expected.items():
        found = source.shapes.get(name)
        if found is None:
            raise ModelLoadError(f"{source.origin}: tensor {name} is missing; the config needs it with shape {shape}")
        if found != shape:
            raise ModelLoadError(f"{source.origin}: tensor {name} has shape {found}; the config needs {shape}")
    unexpected = sorted(name for name in source.shapes.keys() - expected.keys() if not _may_be_left_out(name, config))
    if unexpected:
        more = f" (and {len(unexpected) - 1} more)" if len(unexpected) > 1 else ""
        raise ModelLoadError(f"{source.origin}: tensor {unexpected[0]}{more} is not part of a {config.family} model")


def _may_be_left_out(name: str, config: ModelConfig) -> bool:
    """Return whether a tensor is redundant: a computed value (old rope buffers) or a second copy (a tied head)."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


class WeightReader:
    """Reads tensors for the layers and counts them. Safe to use from several loading threads."""

    def __init__(self, source: WeightSource, *, dtype: torch.dtype, device: torch.device) -> None:
        self._source = source
        self._dtype = dtype
        self._device = device
        self._lock = threading.Lock()
        self._num_read = 0

    @property
    def num_read(self) -> int:
        return self._num_read

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Tensor:
        tensor = self._source.read(name, rows, columns)
        with self._lock:
            self._num_read += 1
        return tensor.to(device=self._device, dtype=self._dtype)
