"""Page lists of running requests, kept on the device from step to step.

Converting every request's list for every step would cost a millisecond of Python at 256 requests. So each list has a
seat, a row of a table on the device, which is written once and then only where the list has grown: a step sends the
few new page ids, and picks its rows.

A list is known by its identity: one that is handed in again may have grown, and has not changed otherwise (that is
what `PageLease.page_ids` does). Seats of lists that are no longer used go to new ones, the longest unused first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvist.attention.backend import Span


@dataclass(slots=True)
class _Seat:
    """Owned by `PageTables`."""

    row: int
    page_ids: Sequence[int]  # held, so that its identity stays its own
    num_written: int  # page_ids[:num_written] are on the device
    step: int  # the last that used it


class PageTables:
    def __init__(self, device: torch.device, page_size: int, *, num_seats: int = 64, max_pages: int = 64) -> None:
        self._device = device
        self._page_size = page_size
        self._table = torch.zeros(num_seats, max_pages, dtype=torch.int32, device=device)
        self._free = list(range(num_seats))
        self._seats: dict[int, _Seat] = {}  # by id(page_ids)
        self._step = 0

    def reserve(self, num_seats: int, max_pages: int) -> None:
        """Make room without ever growing again below these numbers."""
        old_seats, old_pages = self._table.shape
        if num_seats <= old_seats and max_pages <= old_pages:
            return
        table = self._table.new_zeros(max(num_seats, old_seats), max(max_pages, old_pages))
        table[:old_seats, :old_pages] = self._table
        self._table = table
        self._free += range(old_seats, table.shape[0])

    def seat(self, spans: Sequence[Span]) -> list[int]:
        """The row of each span, in order, after sending what the device does not have of their lists yet."""
        self._step = step = self._step + 1
        seats, page_size = self._seats, self._page_size
        rows: list[int] = []
        places: list[tuple[int, int]] = []
        page_ids: list[int] = []
        for span in spans:  # nearly always: a seat that has all it needs
            seat = seats.get(id(span.page_ids)) or self._new_seat(span.page_ids, len(spans))
            seat.step = step
            if seat.num_written * page_size < span.start + span.num_tokens:
                num_pages = -(-span.end // page_size)
                self.reserve(0, num_pages if num_pages <= self._table.shape[1] else 2 * num_pages)
                assert len(seat.page_ids) >= num_pages, "the scheduler plans pages for every new token"
                places += [(seat.row, page) for page in range(seat.num_written, num_pages)]
                page_ids += seat.page_ids[seat.num_written : num_pages]
                seat.num_written = num_pages
            rows.append(seat.row)
        if places:
            self._send(places, page_ids)
        return rows

    def select(self, rows: Tensor, num_pages: int) -> Tensor:
        """rows [batch] int32 on the device -> [batch, num_pages] int32."""
        return self._table[:, :num_pages].index_select(0, rows)

    def select_into(self, rows: Tensor, out: Tensor) -> None:
        """The same into `out`, whose width was reserved."""
        torch.index_select(self._table[:, : out.shape[1]], 0, rows, out=out)

    def _new_seat(self, page_ids: Sequence[int], batch_size: int) -> _Seat:
        if not self._free:
            oldest = min(self._seats.values(), key=lambda seat: seat.step, default=None)
            if oldest is None or oldest.step == self._step:
                self.reserve(max(2 * self._table.shape[0], 2 * batch_size), 0)
            else:
                self._free.append(self._seats.pop(id(oldest.page_ids)).row)
        seat = _Seat(row=self._free.pop(), page_ids=page_ids, num_written=0, step=0)
        self._seats[id(page_ids)] = seat
        return seat

    def _send(self, places: list[tuple[int, int]], page_ids: list[int]) -> None:
        where = np.array(places, dtype=np.int64)
        packed = np.concatenate((where[:, 0] * self._table.shape[1] + where[:, 1], np.array(page_ids, dtype=np.int64)))
        index, value = upload(packed, self._device).chunk(2)
        self._table.view(-1).index_copy_(0, index, value.int())


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for: torch keeps the pinned memory until it is done."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
