"""Page lists keep their rows from step to step, and every step reads the pages of its spans."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvist.attention.backend import Span, SpanColumns
from kvist.attention.fa3 import _GraphPlan, _Index
from kvist.attention.page_tables import PageTables
from kvist.attention.pinned import PinnedRing

CPU = torch.device("cpu")
PAGE_SIZE = 4


def decodes(lists: Sequence[list[int]], lengths: Sequence[int]) -> SpanColumns:
    return SpanColumns.of(
        [Span(start=n - 1, num_tokens=1, page_ids=pages) for pages, n in zip(lists, lengths, strict=True)]
    )


def read(tables: PageTables, spans: SpanColumns) -> list[list[int]]:
    """Return each span's pages as the device reads them, after checking them against the host's copy."""
    num_pages = -(-spans.ends // PAGE_SIZE)
    pages = torch.full((len(spans), int(num_pages.max())), -7, dtype=torch.int32)
    rows = tables.assign_rows(spans)
    tables.read(torch.from_numpy(rows), torch.from_numpy(spans.ends), pages)
    found = [row[:n] for row, n in zip(pages.tolist(), num_pages.tolist(), strict=True)]
    assert tables.pages(rows, num_pages).tolist() == [page for row in found for page in row]
    return found


def test_a_grown_page_list_is_written_from_its_old_end() -> None:
    tables = PageTables(CPU, PAGE_SIZE, num_rows=2, max_pages=4)
    pages = [7, 8]
    assert read(tables, decodes([pages], [8])) == [[7, 8]]
    pages.append(9)
    pages[0] = 99  # not allowed; here it proves that the first page is not written again
    assert read(tables, decodes([pages], [9])) == [[7, 8, 9]]


def test_equal_page_lists_of_two_requests_get_two_rows() -> None:
    tables = PageTables(CPU, PAGE_SIZE, num_rows=2, max_pages=4)
    first, second = [3], [3]
    read(tables, decodes([first, second], [4, 4]))
    assert read(tables, decodes([second, first], [4, 4])) == [[3], [3]]
    first.append(4)
    second.append(5)
    assert read(tables, decodes([second, first], [5, 5])) == [[3, 5], [3, 4]]


def test_a_row_used_in_the_last_two_steps_is_not_reused() -> None:
    """The GPU may not have started those steps yet, so it may still read the row."""
    tables = PageTables(CPU, PAGE_SIZE, num_rows=1, max_pages=1)
    tables.reserve(1, 1)
    previous: list[int] = []
    for page in range(20):
        (row,) = tables.assign_rows(decodes([[page]], [1])).tolist()
        assert row not in previous[-2:]
        previous.append(row)
    assert set(previous) == {0, 1, 2}, "the reserved table does not grow"


def test_a_reserved_page_table_never_moves() -> None:
    tables = PageTables(CPU, PAGE_SIZE, num_rows=1, max_pages=1)
    tables.reserve(2, 3)
    with pytest.raises(AssertionError, match="captured"):
        tables.assign_rows(decodes([[1, 2, 3, 4]], [16]))


@given(st.data())
def test_every_step_reads_the_pages_of_its_spans(data: st.DataObject) -> None:
    tables = PageTables(CPU, PAGE_SIZE, num_rows=2, max_pages=1)
    requests: list[list[int]] = [[i] for i in range(12)]
    next_page = 100
    for _ in range(data.draw(st.integers(1, 12))):
        members = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=6, unique=True))
        for i in members:
            if data.draw(st.booleans()):
                requests[i] = []  # its lease was closed, and the request got a new one
            for _ in range(data.draw(st.integers(not requests[i], 3))):
                requests[i].append(next_page)
                next_page += 1
        lists = [requests[i] for i in members]
        assert read(tables, decodes(lists, [len(each) * PAGE_SIZE for each in lists])) == lists


RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=5)


def spans_of(ranges: list[tuple[int, int]]) -> list[Span]:
    return [
        Span(start=start, num_tokens=count, page_ids=[(i + 1) * 50 + p for p in range(20)])
        for i, (start, count) in enumerate(ranges)
    ]


@given(RANGES)
def test_slots_follow_from_the_pages_and_the_positions(ranges: list[tuple[int, int]]) -> None:
    spans = spans_of(ranges)
    expected = [
        span.page_ids[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        for span in spans
        for position in range(span.start, span.end)
    ]
    tables, columns = PageTables(CPU, PAGE_SIZE), SpanColumns.of(spans)
    assert tables.slots(columns, tables.assign_rows(columns)).tolist() == expected


@given(RANGES)
def test_span_columns_equal_their_spans(ranges: list[tuple[int, int]]) -> None:
    spans = spans_of(ranges)
    columns = SpanColumns.of(spans)
    assert SpanColumns.of(columns) is columns
    assert (list(columns), len(columns), columns[-1], columns[1:]) == (spans, len(spans), spans[-1], spans[1:])
    assert columns.ends.tolist() == [span.end for span in spans]
    assert columns.positions().tolist() == [at for span in spans for at in range(span.start, span.end)]


def test_a_captured_step_reads_lengths_slots_and_pages_at_fixed_addresses() -> None:
    tables, index = PageTables(CPU, PAGE_SIZE), _Index.allocate(4, 12, CPU)
    tables.reserve(4, 3)
    table = torch.zeros(4, 3, dtype=torch.int32)
    plan = _GraphPlan(None, tables, PinnedRing(CPU), index, table, has_chunks=True)  # type: ignore[arg-type]  # no pool
    plan.fill([])
    plan.attend(12)
    assert (index.ends.tolist(), index.cumulative.tolist(), set(index.slots.tolist())) == ([0] * 4, [0] * 5, {-1})
    lists = [[5, 6, 7], [4], [8, 9]]
    for _ in range(4):
        plan.fill(decodes([*lists, [1]], [9, 4, 8, 1]))
    before = index.packed.data_ptr()
    chunk = Span(start=2, num_tokens=6, page_ids=lists[2])
    plan.fill([*decodes(lists[:2], [9, 4]), chunk])
    plan.attend(12)
    assert index.packed.data_ptr() == before
    assert index.ends.tolist() == [9, 4, 8, 0]
    assert index.decode_lengths.tolist() == [9, 4, 0, 0]
    assert index.chunk_lengths.tolist() == [0, 0, 8, 0]
    assert index.cumulative.tolist() == [2, 2, 2, 8, 8]
    assert (
        index.slots.tolist()
        == [7 * 4, 4 * 4 + 3, 8 * 4 + 2, 8 * 4 + 3, 9 * 4, 9 * 4 + 1, 9 * 4 + 2, 9 * 4 + 3] + [-1] * 4
    )
    assert [row[:n] for row, n in zip(table.tolist(), (3, 1, 2), strict=False)] == lists
