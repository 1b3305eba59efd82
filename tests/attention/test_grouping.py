"""Decodes are grouped by length: every request is in a group, and padding is bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvist.attention.backend import Span
from kvist.attention.torch_reference import _PADDING_PAGES_FREE, _PADDING_SHARE, _group_by_length

PAGE_SIZE = 16


@given(st.lists(st.integers(1, 4000), max_size=40))
def test_every_request_is_in_one_group_and_padding_is_bounded(lengths: list[int]) -> None:
    spans = [Span(start=length - 1, num_tokens=1, page_ids=[]) for length in lengths]
    groups = _group_by_length(spans, PAGE_SIZE)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        pages = [-(-lengths[index] // PAGE_SIZE) for index in group]
        padding = max(pages) * len(pages) - sum(pages)
        assert padding <= max(_PADDING_PAGES_FREE, _PADDING_SHARE * sum(pages))


def test_requests_of_equal_length_stay_in_order_in_one_group() -> None:
    spans = [Span(start=100, num_tokens=1, page_ids=[]) for _ in range(5)]
    assert _group_by_length(spans, PAGE_SIZE) == [[0, 1, 2, 3, 4]]


def test_one_long_request_does_not_pad_the_others() -> None:
    spans = [Span(start=length, num_tokens=1, page_ids=[]) for length in (40, 30_000, 50, 45)]
    assert _group_by_length(spans, PAGE_SIZE) == [[1], [0, 2, 3]]
