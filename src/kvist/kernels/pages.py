"""Sums over whole pages, and copies to another pool in the same pass: used by a handoff through device memory.

A page's two sums are an error check: they certainly differ when one 64-bit word differs, and differ except with
negligible probability when several words differ or change places. They do not protect against an attacker who chooses
the words.

For each word w at index i of its page (from 1), in 64-bit arithmetic that wraps; every operation is invertible, so no
change is lost:

    x = w ^ (i * A);  x ^= x >> 32;  x *= B;  x ^= x >> 29;  first += x;  x *= C;  x ^= x >> 32;  second += x

The sums of the pieces of a page add up to the sums of the page.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kvist.kernels.operands import MIX_CONSTANTS, WORD_BYTES


def sum_pages(pages: Tensor, page_ids: Sequence[int], *, first_word: int = 0) -> Tensor:
    """Return the sums of the pages, [len(page_ids), 2] int64. `pages` [num_pages, num_words] int64, with contiguous
    rows: whole pages, or the piece of each page that begins at its word `first_word`."""
    if not pages.is_cuda:
        return sum_pages_torch(pages[list(page_ids)], first_word)
    from kvist.kernels.gpu import pages as gpu

    return gpu.sum_pages(pages, page_ids, first_word)


def copy_pages(
    pages: Tensor,
    page_ids: Sequence[int],
    target: int,
    target_ids: Sequence[int],
    *,
    target_page_bytes: int | None = None,
    first_word: int = 0,
) -> Tensor:
    """Copy pages, or a piece of each page, to the pages `target_ids` of the pool whose first page, or piece, is at the
    address `target`; return the sums of the words read.

    `target_page_bytes`: the distance between the target's pages; by default they have the size of `pages`. On CUDA the
    target's memory is mapped for the device of `pages`.
    """
    distance = pages.shape[1] * WORD_BYTES if target_page_bytes is None else target_page_bytes
    if not pages.is_cuda:
        return copy_pages_torch(pages, page_ids, target, target_ids, distance, first_word)
    from kvist.kernels.gpu import pages as gpu

    return gpu.sum_pages(pages, page_ids, first_word, gpu.Target(target, target_ids, distance))


def sum_pages_torch(words: Tensor, first_word: int = 0) -> Tensor:
    """words [num_pages, num_words] int64 -> sums [num_pages, 2] int64."""
    a, b, c = (_signed_64(constant) for constant in MIX_CONSTANTS)
    places = torch.arange(first_word + 1, first_word + 1 + words.shape[1], device=words.device)
    mixed = words ^ (places * a)
    mixed = _folded(_folded(mixed, 32).mul_(b), 29)
    first = mixed.sum(dim=1)
    mixed = _folded(mixed.mul_(c), 32)
    return torch.stack((first, mixed.sum(dim=1)), dim=1)


def copy_pages_torch(
    pages: Tensor,
    page_ids: Sequence[int],
    target: int,
    target_ids: Sequence[int],
    target_page_bytes: int,
    first_word: int,
) -> Tensor:
    words = pages[list(page_ids)]
    for page, target_id in zip(words, target_ids, strict=True):
        ctypes.memmove(target + target_id * target_page_bytes, page.data_ptr(), page.nbytes)
    return sum_pages_torch(words, first_word)


def _folded(mixed: Tensor, shift: int) -> Tensor:
    # torch's >> extends the sign, so mask the result
    return mixed.bitwise_xor_((mixed >> shift).bitwise_and_((1 << (64 - shift)) - 1))


def _signed_64(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
