"""Constants and values shared by a kernel's public function, its torch twin and its GPU version.

This file is below both `kernels/x.py` and `kernels/gpu/x.py`, so neither file imports the other at import time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Decode attention (decode_attention.py).
TARGET_ITEMS = 128  # at least this many items per step, when its contexts are long enough
MIN_ITEM_TOKENS = 128
ITEM_MULTIPLE = 64  # the number of tokens of an item is a multiple of this, except at the end of a context

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
class SamplingColumns:
    """The parameters by which R rows choose their tokens (sampling.py, truncation.py), on one device."""

    temperatures: Tensor  # [R] fp32; 0: greedy, which the other parameters do not change
    keys: Tensor  # [R, 2] int32, of the noise; not read for greedy rows
    top_k: Tensor  # [R] int32; 0: off
    top_p: Tensor  # [R] fp32; 1: off
    reach: Tensor  # [R] fp32: min_p's floor of the shifted logits; -inf: off

    @classmethod
    def untruncated(cls, temperatures: Tensor, keys: Tensor) -> SamplingColumns:
        return cls(
            temperatures=temperatures,
            keys=keys,
            top_k=torch.zeros_like(temperatures, dtype=torch.int32),
            top_p=torch.ones_like(temperatures),
            reach=torch.full_like(temperatures, float("-inf")),
        )

    def select(self, rows: Tensor) -> SamplingColumns:
        """rows [n] int64."""
        columns = (self.temperatures, self.keys, self.top_k, self.top_p, self.reach)
        temperatures, keys, top_k, top_p, reach = (column.index_select(0, rows) for column in columns)
        return SamplingColumns(temperatures=temperatures, keys=keys, top_k=top_k, top_p=top_p, reach=reach)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapingTables:
    """The changes of logits that requests specify (shaping.py), on one device, with a row for each of S slots.

    V: size of the vocabulary. Limits of a slot: B biases, W bad words of several tokens, L tokens of such a word."""

    counts: Tensor  # [S, V] int16 or int32: occurrences in the output; the sign bit: the prompt contains the token
    banned: Tensor  # [S, ceil(V / 32)] int32: bit i of word w bans the token 32 w + i
    penalties: Tensor  # [S, 3] fp32: repetition, frequency, presence
    bias_ids: Tensor  # [S, B] int32, distinct; -1: no entry
    bias_values: Tensor  # [S, B] fp32
    words: Tensor  # [S, L, W] int32: each word's last token, the token before it, and so on
    recent: Tensor  # [S, L] int32: the newest token of the sequence, the token before it, and so on


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapedRows:
    """The tables that apply to R rows."""

    tables: ShapingTables
    slots: Tensor  # [R] int32; read where a flag is set
    flags: Tensor  # [R] int32: BANS, PENALTIES, BIAS, WORDS


BANS, PENALTIES, BIAS, WORDS = 1, 2, 4, 8  # which tables apply to a row
ANY_TOKEN = -1  # in a bad word: matches every token; as its last token: no word
NO_HISTORY = -2  # a recent token before the start of the sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """The rotation of q and k between their projection and attention (rotary.py)."""

    cos: Tensor  # [num_tokens, 1, head_dim], fp32
    sin: Tensor  # [num_tokens, 1, head_dim], fp32; the first half is negated
    qk_weight: Tensor | None = None  # [num_q_heads + num_kv_heads, head_dim]: RMSNorm of each head, before the rotation
    eps: float = 0.0
