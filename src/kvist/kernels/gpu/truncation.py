"""Finds where each row's distribution is cut, from histograms of its logits.

The distances of logits from the row's largest are non-negative floats, whose bit patterns have the same order: the
exponent and the seven highest bits of the fraction number 2048 bins, from 2^-9 to 2^7. top_k ends in the bin where the
counts reach k, top_p in the bin where the weights reach top_p. Tokens in nearer bins are kept, tokens in farther bins
are dropped; only those between (`Cuts`) are listed by the next pass and compared exactly (sampling.cu).

Weights: exp(-distance / temperature) is the weight of the bin's edge times a fraction. Histograms sum the fractions as
integers of WEIGHT_BITS bits.

For top_k up to the number of maxima, the k-th largest maximum bounds the k-th largest logit from below: groups of
logits below that bound are not even read.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.gpu.launch import wait_for_inputs

BINS, SHIFT = 2048, 16
FIRST_BIN = (127 - 9) << 7
WEIGHT_BITS = 17
MAX_LISTED = 4096  # tokens of a row between its cuts; of a row with more, the last kernel reads the logits again
NO_BIN = -1

_BINS, _SHIFT, _FIRST_BIN, _NO_BIN = (tl.constexpr(value) for value in (BINS, SHIFT, FIRST_BIN, NO_BIN))
_MAX_LISTED = tl.constexpr(MAX_LISTED)
_ONE = tl.constexpr(float(1 << WEIGHT_BITS))
_SPANS = tl.constexpr(64)  # of bins, for the search
_SPAN_BINS = tl.constexpr(BINS // 64)
_MARGIN = tl.constexpr(1.0 / 65536.0)  # far more than the rounding of weights


class Cuts(NamedTuple):
    """Where R rows are cut."""

    # [R, 4] int32: tokens in bins below the first are kept, tokens in bins above the second are dropped. The third is
    # the bin in which top_k ends, or NO_BIN; then the number of tokens below it. Rows that do not truncate: BINS first.
    bins: Tensor
    weights: Tensor  # [R, 3] fp64: of the tokens below the first bin, below the third bin, and of all
    num_listed: Tensor  # [R] int32, 0: for the pass that lists the tokens of the bins between


@triton.jit
def _uses_top_k(temperature, top_k, vocab_size):
    return (temperature > 0.0) & (top_k > 0) & (top_k < vocab_size)


# Batches place the columns at any offset of one buffer: a version for each alignment would be compiled while serving.
@triton.jit(do_not_specialize_on_alignment=["temperatures", "top_k", "top_p"])
def find_highest(
    maxima, num_maxima, vocab_size, temperatures, top_k, top_p, highest, bounds, counts, weights,
    NTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program a row: find the largest logit, NaN if the row is invalid; prepare the bins of a row to truncate."""
    row = tl.program_id(0).to(tl.int64)
    nth = tl.arange(0, NTH)
    wait_for_inputs(DEPENDENT)
    peaks = tl.load(maxima + row * num_maxima + nth, mask=nth < num_maxima, other=float("-inf"))
    num_broken = tl.sum(((peaks != peaks) | (peaks == float("inf"))).to(tl.int32), axis=0)
    top = tl.max(peaks, axis=0)
    is_valid = (num_broken == 0) & (top > float("-inf"))
    tl.store(highest + row, tl.where(is_valid, top, float("nan")))
    temperature, k, p = tl.load(temperatures + row), tl.load(top_k + row), tl.load(top_p + row)
    uses_k = _uses_top_k(temperature, k, vocab_size)
    if is_valid & (uses_k | ((temperature > 0.0) & (p < 1.0))):
        bound = top * 0.0 + float("-inf")
        if uses_k & (k <= num_maxima):
            descending = tl.sort(peaks, descending=True)
            bound = tl.max(tl.where(nth == k - 1, descending, float("-inf")), axis=0)
        tl.store(bounds + row, bound)
        for start in range(0, _BINS, 256):
            bins = start + tl.arange(0, 256)
            tl.store(counts + row * _BINS + bins, tl.zeros((256,), tl.int32))
            tl.store(weights + row * _BINS + bins, tl.zeros((256,), tl.int64))


@triton.jit
def _find_bin(sums, wanted):
    """sums [_SPANS, _SPAN_BINS]: return the first bin where the sum of all bins so far reaches `wanted`, else the last
    one; and the sum of the bins before it, and with it."""
    spans, places = tl.arange(0, _SPANS), tl.arange(0, _SPAN_BINS)
    of_spans = tl.sum(sums, axis=1)
    span = tl.minimum(tl.sum((tl.cumsum(of_spans, axis=0) < wanted).to(tl.int32), axis=0), _SPANS - 1)
    before = tl.sum(tl.where(spans < span, of_spans, 0), axis=0)
    inside = tl.sum(tl.where(spans[:, None] == span, sums, 0), axis=0)
    place = tl.sum((before + tl.cumsum(inside, axis=0) < wanted).to(tl.int32), axis=0)
    place = tl.minimum(place, _SPAN_BINS - 1)
    before += tl.sum(tl.where(places < place, inside, 0), axis=0)
    return span * _SPAN_BINS + place, before, before + tl.sum(tl.where(places == place, inside, 0), axis=0)


@triton.jit
def _sum_before(sums, bins, bin):
    return tl.sum(tl.sum(tl.where(bins < bin, sums, 0), axis=1), axis=0)


@triton.jit(do_not_specialize_on_alignment=["temperatures", "top_k", "top_p"])
def find_cuts(
    vocab_size, temperatures, top_k, top_p, highest, counts, weights, cut_bins, cut_weights, num_listed,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program a row: find the bins in which top_k and top_p end."""
    row = tl.program_id(0).to(tl.int64)
    wait_for_inputs(DEPENDENT)
    temperature, k, p = tl.load(temperatures + row), tl.load(top_k + row), tl.load(top_p + row)
    top = tl.load(highest + row)
    uses_k, uses_p = _uses_top_k(temperature, k, vocab_size), (temperature > 0.0) & (p < 1.0)
    tl.store(num_listed + row, 0)
    first, last, kth, before_kth = k * 0 + _BINS, k * 0 + _NO_BIN, k * 0 + _NO_BIN, k * 0
    if (top == top) & (uses_k | uses_p):
        bins = tl.arange(0, _SPANS)[:, None] * _SPAN_BINS + tl.arange(0, _SPAN_BINS)[None, :]
        bits = tl.where(bins > 0, (bins + _FIRST_BIN) << _SHIFT, 0)
        edges = bits.to(tl.float32, bitcast=True)
        sums = tl.load(weights + row * _BINS + bins).to(tl.float64) / _ONE
        sums *= tl.exp(-edges / temperature).to(tl.float64)
        low = tl.sum(tl.sum(sums, axis=1), axis=0)
        high, weight_before_kth = low, low * 0.0
        within_kth = before_kth
        if uses_k:
            kth, before_kth, within_kth = _find_bin(tl.load(counts + row * _BINS + bins), k)
            weight_before_kth = _sum_before(sums, bins, kth)
            low = weight_before_kth * (1.0 - _MARGIN)  # top_k keeps a part of its last bin
            high = _sum_before(sums, bins, kth + 1) * (1.0 + _MARGIN)
            first, last = kth, kth
        if uses_p:
            wanted = p.to(tl.float64)
            first, _, _ = _find_bin(sums, low * wanted)
            last, _, _ = _find_bin(sums, high * wanted)
            if uses_k:
                first, last = tl.minimum(first, kth), tl.minimum(last, kth)
        if uses_k & (within_kth <= _MAX_LISTED):
            first = first * 0  # few tokens: list them all
        tl.store(cut_weights + row * 3, _sum_before(sums, bins, first))
        tl.store(cut_weights + row * 3 + 1, weight_before_kth)
        tl.store(cut_weights + row * 3 + 2, high)
    tl.store(cut_bins + row * 4, first)
    tl.store(cut_bins + row * 4 + 1, last)
    tl.store(cut_bins + row * 4 + 2, kth)
    tl.store(cut_bins + row * 4 + 3, before_kth)
