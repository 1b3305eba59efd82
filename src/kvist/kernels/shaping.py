"""Shapes logits before the choice of tokens: banned tokens, bad words, bias, and penalties for tokens that occurred.

The parameters of requests are in tables with one row for each request slot. A row of a batch has a slot, and flags for
the tables that apply; rows without flags read nothing. After the choice, the chosen token is recorded in the tables,
because the next step may be launched before the host knows the token.

    value = logit, -inf if the token is banned or would complete a bad word
    value += bias
    value = value / repetition if value > 0 else value * repetition     for tokens of prompt and output
    value -= frequency * (occurrences in the output)
    value -= presence                                                   for tokens of the output
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.kernels.operands import ANY_TOKEN, BANS, BIAS, PENALTIES, WORDS, ShapedRows, ShapingTables

_NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSizes:
    num_slots: int
    vocab_size: int
    context_len: int  # most tokens of a request
    max_biases: int  # of a slot
    max_words: int
    max_word_tokens: int

    @property
    def counts_dtype(self) -> torch.dtype:
        """The smallest type that counts the output tokens of any request exactly. A prompt has at least a token."""
        return torch.int16 if self.context_len <= 1 << 15 else torch.int32

    @property
    def num_bytes(self) -> int:
        counts = self.vocab_size * self.counts_dtype.itemsize
        words = -(-self.vocab_size // 32) + 3 + 2 * self.max_biases + self.max_word_tokens * (self.max_words + 1)
        return self.num_slots * (counts + 4 * words)


def make_tables(sizes: TableSizes, device: torch.device) -> ShapingTables:
    """Return empty tables. On a CPU the system assigns their memory when a slot first uses it."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(sizes.num_slots, *shape, dtype=dtype, device=device)

    return ShapingTables(
        counts=zeros(sizes.vocab_size, dtype=sizes.counts_dtype),
        banned=zeros(-(-sizes.vocab_size // 32)),
        penalties=zeros(3, dtype=torch.float32),
        bias_ids=zeros(sizes.max_biases),
        bias_values=zeros(sizes.max_biases, dtype=torch.float32),
        words=zeros(sizes.max_word_tokens, sizes.max_words),
        recent=zeros(sizes.max_word_tokens),
    )


def shape_logits_torch(logits: Tensor, rows: ShapedRows) -> Tensor:
    """Return the shaped logits [R, V]: a copy, or `logits` [R, V] fp32 or bf16 itself if no row has a flag."""
    if not rows.flags.any():
        return logits
    shaped = logits.clone(memory_format=torch.contiguous_format)
    for values, slot, flag in zip(shaped, rows.slots.tolist(), rows.flags.tolist(), strict=True):
        if flag:
            values.copy_(_shape_row(values.float(), slot, flag, rows.tables))
    return shaped


def _shape_row(values: Tensor, slot: int, flag: int, tables: ShapingTables) -> Tensor:
    # A ban adds -inf, so that NaN stays NaN.
    if flag & BANS:
        values = values + torch.where(unpack_bits(tables.banned[slot], len(values)), _NEG_INF, 0.0)
    if flag & WORDS:
        completing = _completing_tokens(tables.words[slot], tables.recent[slot])
        values[completing] += _NEG_INF
    if flag & BIAS:
        used = tables.bias_ids[slot] >= 0
        values[tables.bias_ids[slot][used]] += tables.bias_values[slot][used]
    if flag & PENALTIES:
        repetition, frequency, presence = tables.penalties[slot]
        marks = tables.counts[slot].int()
        counts = marks & (torch.iinfo(tables.counts.dtype).max)
        repeated = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(marks != 0, repeated, values)
        values = values - frequency * counts - torch.where(counts > 0, presence, 0.0)
    return values


def _completing_tokens(words: Tensor, recent: Tensor) -> Tensor:
    """Return the tokens that would complete a word: words [L, W], recent [L]."""
    before = words[1:]
    matches = ((before == ANY_TOKEN) | (before == recent[:-1, None])).all(dim=0)
    return words[0][matches & (words[0] != ANY_TOKEN)]


def unpack_bits(packed: Tensor, num_bits: int) -> Tensor:
    """packed [n] int32 -> [num_bits] bool, the lowest bit of each word first."""
    bits = (packed[:, None] >> torch.arange(32, device=packed.device)) & 1
    return bits.flatten()[:num_bits].bool()


def record_tokens_torch(chosen: Tensor, rows: ShapedRows) -> None:
    """Add the chosen tokens [R] int64 to the tables of rows with PENALTIES or WORDS. NO_TOKEN changes nothing."""
    tables = rows.tables
    if not rows.flags.any():
        return
    for token_id, slot, flag in zip(chosen.tolist(), rows.slots.tolist(), rows.flags.tolist(), strict=True):
        if token_id < 0:
            continue
        if flag & PENALTIES:
            tables.counts[slot, token_id] += 1
        if flag & WORDS:
            tables.recent[slot] = torch.cat((tables.recent.new_tensor([token_id]), tables.recent[slot, :-1]))
