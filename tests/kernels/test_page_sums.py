"""The sums of a page: their definition, and the changes that they detect."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvist.kernels.operands import MIX_CONSTANTS
from kvist.kernels.pages import copy_pages, sum_pages, sum_pages_torch

MASK = (1 << 64) - 1


@pytest.fixture
def pages() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-(2**63), 2**63 - 1, (6, 33), generator=generator)


def sums(words: Tensor) -> tuple[int, int]:
    [[first, second]] = sum_pages_torch(words[None]).tolist()
    return first & MASK, second & MASK


def test_page_sums_equal_the_documented_formula(pages: Tensor) -> None:
    a, b, c = MIX_CONSTANTS
    first = second = 0
    for place, word in enumerate(pages[0].tolist(), start=1):
        x = (word & MASK) ^ (place * a & MASK)
        x ^= x >> 32
        x = x * b & MASK
        x ^= x >> 29
        first += x
        x = x * c & MASK
        x ^= x >> 32
        second += x
    assert sums(pages[0]) == (first & MASK, second & MASK)


def test_every_bit_of_a_page_changes_both_sums(pages: Tensor) -> None:
    page, before = pages[0], sums(pages[0])
    for place, bit in itertools.product(range(len(page)), range(64)):
        changed = page.clone()
        changed[place] ^= torch.tensor(1 << bit if bit < 63 else -(1 << 63))
        after = sums(changed)
        assert after[0] != before[0]
        assert after[1] != before[1]


@pytest.mark.parametrize("bit", [0, 31, 32, 62, 63])
def test_flipping_the_same_bit_of_two_words_changes_the_sums(pages: Tensor, bit: int) -> None:
    """In a plain weighted sum the highest bits would cancel."""
    page, before = pages[0], sums(pages[0])
    flip = torch.tensor(1 << bit if bit < 63 else -(1 << 63))
    for places in itertools.combinations(range(len(page)), 2):
        changed = page.clone()
        changed[list(places)] ^= flip
        assert sums(changed) != before


def test_swapping_two_words_changes_the_sums(pages: Tensor) -> None:
    page = pages[0]
    assert sums(page.roll(1)) != sums(page)
    assert sums(page.flip(0)) != sums(page)
    constant = torch.full((8,), 7)
    constant[2] = 8
    assert sums(constant) != sums(constant.roll(1))


def test_pages_of_zeros_of_different_lengths_have_different_sums() -> None:
    seen = {sums(torch.zeros(length, dtype=torch.int64)) for length in range(20)}
    assert len(seen) == 20


def test_pages_are_summed_and_copied_in_the_given_order(pages: Tensor) -> None:
    target = torch.zeros_like(pages)
    copied = copy_pages(pages, (4, 0), target.data_ptr(), (1, 5))
    assert torch.equal(copied, sum_pages(pages, (4, 0)))
    assert copied.tolist() == sum_pages_torch(pages[[4, 0]]).tolist()
    assert torch.equal(target[[1, 5]], pages[[4, 0]])
    assert not target[[0, 2, 3, 4]].any()


@pytest.mark.parametrize("at", [1, 16, 32])
def test_the_sums_of_pieces_add_up_to_those_of_the_page(pages: Tensor, at: int) -> None:
    first, last = sum_pages(pages[:, :at], (4, 0)), sum_pages(pages[:, at:], (4, 0), first_word=at)
    assert torch.equal(first + last, sum_pages(pages, (4, 0)))
    assert not torch.equal(last, sum_pages(pages[:, at:], (4, 0)))


def test_a_piece_of_each_page_is_copied_to_pages_of_another_size(pages: Tensor) -> None:
    target = torch.zeros(6, 40, dtype=torch.int64)
    copied = copy_pages(
        pages[:, 5:25], (4, 0), target[:, 9:].data_ptr(), (1, 5), target_page_bytes=40 * 8, first_word=5
    )
    assert torch.equal(copied, sum_pages(pages[:, 5:25], (4, 0), first_word=5))
    assert torch.equal(target[[1, 5], 9:29], pages[[4, 0], 5:25])
    target[[1, 5], 9:29] = 0
    assert not target.any()
