"""Constants and values shared by a kernel's public function, its torch twin and its GPU version.

This file is below both `kernels/x.py` and `kernels/gpu/x.py`, so neither file imports the other at import time.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Decode attention (decode_attention.py).
TARGET_ITEMS = 128  # at least this many items per step, when its contexts are long enough
MIN_ITEM_TOKENS = 128
ITEM_MULTIPLE = 64  # tokens of an item are a multiple of it, except at the end of a context

# Page checksums (pages.py).
MIX_CONSTANTS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # A, B, C
WORD_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeItems:
    """The work items of a decode step, from `plan_decodes`. Tensors are int32, on the device of the lengths."""

    lengths: Tensor  # [num_rows]
    firsts: Tensor  # [num_rows + 2]: each row's first item, then the number of items, then the tokens of an item
    rows: Tensor  # [num_rows + TARGET_ITEMS]: each item's row; undefined beyond the number of items


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """The rotation of q and k between their projection and attention (rotary.py)."""

    cos: Tensor  # [num_tokens, 1, head_dim], fp32
    sin: Tensor  # [num_tokens, 1, head_dim], fp32; the first half is negated
    qk_weight: Tensor | None = None  # [num_q_heads + num_kv_heads, head_dim]: RMSNorm of each head, before the rotation
    eps: float = 0.0
