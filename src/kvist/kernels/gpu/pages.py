"""Page sums and page copies in one pass: each word is read once, mixed, and optionally written to the target pool.

One program per block of a page, or of a piece of the page. Pages and targets are passed as addresses, so the target may
be memory that another process allocated, also on another GPU. Launched on a separate stream, never with programmatic
dependent launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.operands import MIX_CONSTANTS, WORD_BYTES

_BLOCK = 2048  # words
_A, _B, _C = (tl.constexpr(constant) for constant in MIX_CONSTANTS)


@triton.jit(do_not_specialize=["first_word"])
def _sum_pages(
    addresses, targets, sums, num_words, first_word, COPY: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr
):
    page, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places = block * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_words
    source = tl.load(addresses + page).to(tl.pointer_type(tl.uint64))
    if EVEN:  # every address is a multiple of 16
        source = tl.multiple_of(source, 16)
    word = tl.load(source + places, mask=inside, other=0)
    if COPY:
        target = tl.load(targets + page).to(tl.pointer_type(tl.uint64))
        if EVEN:
            target = tl.multiple_of(target, 16)
        tl.store(target + places, word, mask=inside)
    mixed = word ^ ((first_word + places + 1).to(tl.uint64) * _A)
    mixed = (mixed ^ (mixed >> 32)) * _B
    mixed = mixed ^ (mixed >> 29)
    out = sums + (page * tl.num_programs(1) + block) * 2
    tl.store(out, tl.sum(tl.where(inside, mixed, 0), axis=0).to(tl.int64, bitcast=True))
    mixed = mixed * _C
    mixed = mixed ^ (mixed >> 32)
    tl.store(out + 1, tl.sum(tl.where(inside, mixed, 0), axis=0).to(tl.int64, bitcast=True))


@dataclass(frozen=True, slots=True)
class Target:
    """The pool to which pages are copied."""

    address: int  # of the first page, or of the piece of it
    page_ids: Sequence[int]
    page_bytes: int  # the distance between two pages


def sum_pages(pages: Tensor, page_ids: Sequence[int], first_word: int, target: Target | None = None) -> Tensor:
    num_words, base, page_bytes = pages.shape[1], pages.data_ptr(), pages.stride(0) * WORD_BYTES
    addresses = _addresses(base, page_ids, page_bytes, pages.device)
    targets, is_even = addresses, base % 16 == page_bytes % 16 == 0
    if target is not None:
        targets = _addresses(target.address, target.page_ids, target.page_bytes, pages.device)
        is_even = is_even and target.address % 16 == target.page_bytes % 16 == 0
    num_blocks = triton.cdiv(num_words, _BLOCK)
    sums = torch.empty((len(page_ids), num_blocks, 2), dtype=torch.int64, device=pages.device)
    if len(page_ids):
        _sum_pages[(len(page_ids), num_blocks)](
            addresses, targets, sums, num_words, first_word, target is not None, is_even, _BLOCK, num_warps=8
        )
    return sums.sum(dim=1)


def _addresses(base: int, page_ids: Sequence[int], page_bytes: int, device: torch.device) -> Tensor:
    return torch.tensor([base + page_id * page_bytes for page_id in page_ids], dtype=torch.int64, device=device)
