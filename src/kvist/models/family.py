"""What differs between model families, as facts. One decoder (decoder.py) serves them all.

A family file (llama.py, qwen2.py, qwen3.py) holds one `Family` value and nothing else; it imports no torch, so a
gateway can read a model's configuration cheaply.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    name: str  # `model_type` in config.json, `general.architecture` in GGUF
    hf_architecture: str  # the one entry of `architectures` that is this family's text generator
    qkv_bias: bool | None  # None: config.json's `attention_bias` decides
    output_bias_with_qkv: bool  # o_proj has a bias wherever q, k and v have one
    qk_norm: bool  # RMSNorm over head_dim on q and k, before the rotation
    default_head_dim: int | None  # None: hidden_size // num_heads
    gguf_interleaves_rotation: bool  # GGUF stores q and k rows as rotation pairs (0, D/2, 1, D/2+1, ...)
