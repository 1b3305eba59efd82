"""Shapes logits in place, and finds the largest of each group of logits while they are in registers.

Biases and bad words touch few tokens of a row: one program a row. Bans and penalties touch all: they are applied by the
one pass over the logits that sampling makes anyway. A row without flags is read and not written. The last kernel of
sampling.cu records the chosen tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.gpu.launch import has_dependent_launch, wait_for_inputs
from kvist.kernels.operands import ANY_TOKEN, BANS, BIAS, PENALTIES, WORDS, ShapedRows

BLOCK = 2048  # logits of a program
GROUP = 512  # logits of a maximum

_BANS, _PENALTIES, _BIAS, _WORDS = (tl.constexpr(flag) for flag in (BANS, PENALTIES, BIAS, WORDS))
_ANY_TOKEN = tl.constexpr(ANY_TOKEN)


# Batches place `slots` and `flags` at any offset of one buffer: a version for each alignment would be compiled while
# serving.
@triton.jit(do_not_specialize_on_alignment=["slots", "flags"])
def _shape_some(
    logits, row_stride, slots, flags, bias_ids, bias_values, words, recent,
    NUM_BIASES: tl.constexpr, NUM_WORDS: tl.constexpr, WORD_TOKENS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Add biases, and ban the tokens that would complete a bad word."""
    row = tl.program_id(0).to(tl.int64)
    wait_for_inputs(DEPENDENT)
    flag = tl.load(flags + row)
    if (flag & (_BIAS | _WORDS)) != 0:
        slot = tl.load(slots + row).to(tl.int64)
        if (flag & _BIAS) != 0:
            nth = tl.arange(0, NUM_BIASES)
            tokens = tl.load(bias_ids + slot * NUM_BIASES + nth)
            biases = tl.load(bias_values + slot * NUM_BIASES + nth)
            places = logits + row * row_stride + tokens
            values = tl.load(places, mask=tokens >= 0, other=0.0)
            tl.store(places, values + biases, mask=tokens >= 0)
        if (flag & _WORDS) != 0:
            nth = tl.arange(0, NUM_WORDS)
            base = words + slot * NUM_WORDS * WORD_TOKENS
            tokens = tl.load(base + nth)
            completes = tokens != _ANY_TOKEN
            for place in range(1, WORD_TOKENS):
                wanted = tl.load(base + place * NUM_WORDS + nth)
                completes &= (wanted == _ANY_TOKEN) | (wanted == tl.load(recent + slot * WORD_TOKENS + place - 1))
            tl.debug_barrier()  # other threads may have added a bias to the same token
            places = logits + row * row_stride + tokens
            values = tl.load(places, mask=completes, other=0.0)
            tl.store(places, values + float("-inf"), mask=completes)


@triton.jit(do_not_specialize_on_alignment=["slots", "flags"])
def _shape_all(
    logits, row_stride, vocab_size, slots, flags, banned, counts, penalties, maxima, num_maxima,
    MAX_COUNT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Apply bans and penalties; write the largest logit of each group, or NaN if the group has one."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    places = logits + row * row_stride + tokens
    wait_for_inputs(DEPENDENT)
    values = tl.load(places, mask=inside, other=float("-inf")).to(tl.float32)
    if flags is not None:
        flag = tl.load(flags + row)
        if (flag & (_BANS | _PENALTIES)) != 0:
            slot = tl.load(slots + row).to(tl.int64)
            if (flag & _BANS) != 0:
                num_words = (vocab_size + 31) // 32
                bits = tl.load(banned + slot * num_words + tokens // 32, mask=inside, other=0)
                values += tl.where(((bits >> (tokens % 32)) & 1) != 0, float("-inf"), 0.0)
            if (flag & _PENALTIES) != 0:
                repetition = tl.load(penalties + slot * 3)
                frequency = tl.load(penalties + slot * 3 + 1)
                presence = tl.load(penalties + slot * 3 + 2)
                marks = tl.load(counts + slot * vocab_size + tokens, mask=inside, other=0).to(tl.int32)
                count = marks & MAX_COUNT
                repeated = tl.where(values > 0, tl.div_rn(values, repetition), values * repetition)
                values = tl.where(marks != 0, repeated, values)
                values = values - frequency * count.to(tl.float32) - tl.where(count > 0, presence, 0.0)
            values = values.to(logits.dtype.element_ty)
            tl.store(places, values, mask=inside)
            values = values.to(tl.float32)
    groups = tl.reshape(values, (GROUPS, BLOCK // GROUPS))
    num_broken = tl.sum((groups != groups).to(tl.int32), axis=1)
    highest = tl.where(num_broken > 0, float("nan"), tl.max(groups, axis=1))
    nth = block * GROUPS + tl.arange(0, GROUPS)
    tl.store(maxima + row * num_maxima + nth, highest, mask=nth < num_maxima)


def shape_and_find_maxima(logits: Tensor, shaped: ShapedRows | None) -> Tensor:
    """Shape `logits` [R, V] in place, and return the largest of each `GROUP` of them, [R, ceil(V / GROUP)] fp32; NaN
    for a group with NaN."""
    num_rows, vocab_size = logits.shape
    num_maxima = triton.cdiv(vocab_size, GROUP)
    dependent = has_dependent_launch(logits.device)
    maxima = torch.empty((num_rows, num_maxima), dtype=torch.float32, device=logits.device)
    tables = None if shaped is None else shaped.tables
    if shaped is not None and tables is not None:
        _shape_some[(num_rows,)](
            logits, logits.stride(0), shaped.slots, shaped.flags,
            tables.bias_ids, tables.bias_values, tables.words, tables.recent,
            tables.bias_ids.shape[1], tables.words.shape[2], tables.words.shape[1], dependent,
            launch_pdl=dependent,
        )  # fmt: skip
    _shape_all[(num_rows, triton.cdiv(vocab_size, BLOCK))](
        logits, logits.stride(0), vocab_size,
        None if shaped is None else shaped.slots,
        None if shaped is None else shaped.flags,
        None if tables is None else tables.banned,
        None if tables is None else tables.counts,
        None if tables is None else tables.penalties,
        maxima, num_maxima,
        0 if tables is None else torch.iinfo(tables.counts.dtype).max,
        BLOCK // GROUP, BLOCK, dependent,
        launch_pdl=dependent, enable_fp_fusion=False,
    )  # fmt: skip
    return maxima
