"""Page lists of running requests as rows of one table, kept from step to step.

Converting every request's list for every step would cost a millisecond of Python at 256 requests. Therefore each list
has a row that is written once and then only where the list has grown. The table is in host memory. For a GPU the memory
is pinned: the GPU reads the few rows of a step when the step runs (kernels/page_lists.py), so no table is copied.

A list is recognised by its identity: a known list may have grown, but has not changed otherwise (`PageLease.page_ids`
guarantees that). When no row is free, new lists get the rows of unused lists; rows of the last two steps stay, because
the GPU may not have started those steps yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvist.attention.backend import SpanColumns
from kvist.kernels.page_lists import read_page_lists

_STEPS_UNDER_WAY = 2


class PageTables:
    """Mutable; owned by the backend. Steps must be launched in the order of their `assign_rows` calls."""

    def __init__(self, device: torch.device, page_size: int, *, num_rows: int = 64, max_pages: int = 64) -> None:
        self._device = device
        self._page_size = page_size
        self._table = torch.zeros(0, max_pages, dtype=torch.int32)
        self._host = self._table.numpy()  # the same memory
        self._lists: list[Sequence[int]] = []  # by row; referenced here, so that no id() is reused
        self._num_tokens = np.zeros(0, dtype=np.int32)  # by row: the tokens that fit in the written pages
        # By row: the step that last used it; not up to date for rows of the previous step.
        self._last_step: list[int] = []
        self._row_of: dict[int, int] = {}  # by id() of the list
        self._free: list[int] = []
        self._step = 0
        self._previous: Sequence[Sequence[int]] = ()  # the lists of the previous step
        self._previous_rows: list[int] = []
        self._rows = np.zeros(0, dtype=np.int32)  # `_previous_rows` as an array
        self._is_lasting = False
        self._grow(num_rows, max_pages)

    def reserve(self, max_batch: int, max_pages: int) -> None:
        """Grow the table for the last time: its address is then fixed, so a captured graph may read it."""
        self._grow((1 + _STEPS_UNDER_WAY) * max_batch, max_pages)
        self._is_lasting = True

    def assign_rows(self, spans: SpanColumns) -> npt.NDArray[np.int32]:
        """Return the row of each span, after writing the span's new pages."""
        lists = spans.page_ids
        if lists != self._previous:  # rare: mostly both hold the same objects, and comparing those is fast
            self._change(lists)
        self._step += 1
        rows = self._rows
        for index in np.flatnonzero(spans.ends > self._num_tokens[rows]).tolist():  # once per page of tokens
            self._write(self._previous_rows[index], lists[index], int(spans.ends[index]))
        return rows

    def slots(self, spans: SpanColumns, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return the slot of every new token, in order: page * page_size + offset."""
        pages, offsets = np.divmod(spans.positions(), self._page_size)
        rows_of_tokens = rows if spans.num_tokens == len(spans) else rows.repeat(spans.counts)
        return self._host[rows_of_tokens, pages] * np.int32(self._page_size) + offsets

    def pages(self, rows: npt.NDArray[np.int32], counts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return the first `counts` pages of each row, concatenated."""
        places = np.arange(counts.sum()) - (counts.cumsum() - counts).repeat(counts)
        return self._host[rows.repeat(counts), places]

    def read(self, rows: Tensor, lengths: Tensor, pages: Tensor) -> None:
        """Fill `pages` on the device when the step runs; see kernels/page_lists.py for the arguments."""
        read_page_lists(self._table, rows, lengths, self._page_size, pages)

    def _change(self, lists: Sequence[Sequence[int]]) -> None:
        known = [self._row_of.get(id(pages)) for pages in lists]
        for row in (*self._previous_rows, *(row for row in known if row is not None)):
            self._last_step[row] = self._step  # so that no new list gets these rows
        self._previous_rows = [
            self._new_row(pages) if row is None else row for row, pages in zip(known, lists, strict=True)
        ]
        self._rows = np.array(self._previous_rows, dtype=np.int32)
        self._previous = lists

    def _new_row(self, pages: Sequence[int]) -> int:
        if not self._free:
            self._free = [row for row, step in enumerate(self._last_step) if step <= self._step - _STEPS_UNDER_WAY]
            for row in self._free:
                del self._row_of[id(self._lists[row])]
        if not self._free:
            self._grow(2 * len(self._lists), 0)
        row = self._free.pop()
        self._lists[row] = pages
        self._row_of[id(pages)] = row
        self._num_tokens[row] = 0
        self._last_step[row] = self._step
        return row

    def _write(self, row: int, pages: Sequence[int], num_tokens: int) -> None:
        first, end = int(self._num_tokens[row]) // self._page_size, -(-num_tokens // self._page_size)
        assert len(pages) >= end, "the scheduler plans pages for every new token"
        if end > self._host.shape[1]:
            self._grow(0, 2 * end)
        if end - first == 1:  # a decode
            self._host[row, first] = pages[first]
        else:
            self._host[row, first:end] = pages[first:end]
        self._num_tokens[row] = end * self._page_size

    def _grow(self, num_rows: int, max_pages: int) -> None:
        """Grow the table to at least `num_rows` rows and `max_pages` pages."""
        rows, pages = self._host.shape
        num_rows, max_pages = max(num_rows, rows), max(max_pages, pages)
        if (num_rows, max_pages) == (rows, pages):
            return
        assert not self._is_lasting, "a captured graph reads the table"
        is_gpu = self._device.type == "cuda"
        if is_gpu:
            torch.cuda.synchronize()  # steps in flight read the old memory
        table = torch.zeros(num_rows, max_pages, dtype=torch.int32, pin_memory=is_gpu)
        table[:rows, :pages] = self._table
        self._table, self._host = table, table.numpy()
        self._lists += [()] * (num_rows - rows)
        self._num_tokens = np.pad(self._num_tokens, (0, num_rows - rows))
        self._last_step += [0] * (num_rows - rows)
        self._free += range(rows, num_rows)
