"""Page lists stay on the device from step to step, and are what the spans say, whatever comes and goes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvist.attention.backend import Span
from kvist.attention.page_tables import PageTables
from kvist.attention.slots import written_slots

CPU = torch.device("cpu")
PAGE_SIZE = 4


def rows_of(tables: PageTables, lists: list[list[int]], lengths: list[int]) -> list[list[int]]:
    spans = [Span(start=n - 1, num_tokens=1, page_ids=pages) for pages, n in zip(lists, lengths, strict=True)]
    rows = torch.tensor(tables.seat(spans), dtype=torch.int32)
    selected = tables.select(rows, max(-(-n // PAGE_SIZE) for n in lengths)).tolist()
    return [row[: -(-n // PAGE_SIZE)] for row, n in zip(selected, lengths, strict=True)]


def test_a_list_that_grew_sends_only_its_new_pages() -> None:
    tables = PageTables(CPU, PAGE_SIZE, num_seats=2, max_pages=4)
    pages = [7, 8]
    assert rows_of(tables, [pages], [8]) == [[7, 8]]
    pages.append(9)
    pages[0] = 99  # forbidden; here it shows that the first page is not sent again
    assert rows_of(tables, [pages], [9]) == [[7, 8, 9]]


def test_equal_lists_of_two_requests_are_two_seats() -> None:
    tables = PageTables(CPU, PAGE_SIZE, num_seats=2, max_pages=4)
    first, second = [3], [3]
    rows_of(tables, [first, second], [4, 4])
    first.append(4)
    second.append(5)
    assert rows_of(tables, [first, second], [5, 5]) == [[3, 4], [3, 5]]


@given(st.data())
def test_every_step_selects_what_its_spans_say(data: st.DataObject) -> None:
    tables = PageTables(CPU, PAGE_SIZE, num_seats=2, max_pages=1)
    requests: list[list[int]] = [[i] for i in range(12)]
    next_page = 100
    for _ in range(data.draw(st.integers(1, 12))):
        members = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=6, unique=True))
        for i in members:
            for _ in range(data.draw(st.integers(0, 3))):
                requests[i].append(next_page)
                next_page += 1
        lists = [requests[i] for i in members]
        assert rows_of(tables, lists, [len(pages) * PAGE_SIZE for pages in lists]) == lists


def test_rows_can_be_selected_into_lasting_memory() -> None:
    tables = PageTables(CPU, PAGE_SIZE, num_seats=1, max_pages=1)
    tables.reserve(4, 3)
    out = torch.full((2, 3), -1, dtype=torch.int32)
    rows = tables.seat([Span(start=8, num_tokens=1, page_ids=[5, 6, 7]), Span(start=0, num_tokens=1, page_ids=[4])])
    tables.select_into(torch.tensor(rows, dtype=torch.int32), out)
    assert out[0].tolist() == [5, 6, 7]
    assert out[1, 0] == 4


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=5))
def test_slots_are_the_pages_of_the_positions(ranges: list[tuple[int, int]]) -> None:
    spans = [
        Span(start=start, num_tokens=count, page_ids=[(i + 1) * 50 + p for p in range(20)])
        for i, (start, count) in enumerate(ranges)
    ]
    expected = [
        span.page_ids[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        for span in spans
        for position in range(span.start, span.end)
    ]
    assert written_slots(spans, PAGE_SIZE) == expected
