"""The leading pages of a prompt that each worker holds, from the bits of its pages one after the other. PURE.

Workers have numbers (prefix_index.py); the numbers of one group share a column of bits in each tier. Pages in stores
come as bits of the workers that use the store.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import numpy as np

from kvist.page_index.digest_table import Bits
from kvist.wire import PageTier

TIERS: tuple[PageTier, ...] = get_args(PageTier)
NUMBERS_PER_COLUMN = 32
_ALL = (1 << NUMBERS_PER_COLUMN) - 1


class HeldPages(NamedTuple):
    """The leading pages of a prompt that one worker holds."""

    num_device: int = 0  # in its device pool
    num_host: int = 0  # after those: in the host tier, or in both again
    num_stored: int = 0  # after those: in the worker's store, or in any tier again; the store's pages are hints

    @property
    def num_pages(self) -> int:
        """The number of leading pages in the worker's own tiers."""
        return self.num_device + self.num_host


NOTHING_HELD = HeldPages()


class PageRuns:
    """The workers that hold every page so far, and how far the others came. Mutable; owned by one look-up."""

    def __init__(self, num_groups: int) -> None:
        self._num_pages = 0
        self._groups = [_Group() for _ in range(num_groups)]

    def add(self, columns: list[int], stored: list[int]) -> bool:
        """Take the bits of the next page; `stored` has one element for each group. Return whether a worker has all
        pages so far, in its tiers or in its store."""
        goes_on = False
        for number, group in enumerate(self._groups):
            device, host = columns[number * len(TIERS) : (number + 1) * len(TIERS)]
            goes_on |= group.add(device, host, stored[number], self._num_pages)
        self._num_pages += 1
        return goes_on

    def extend(self, columns: list[Bits], stored: list[Bits]) -> bool:
        """Take the bits of the next pages, by column. Return whether a worker has all pages so far."""
        goes_on = False
        for number, group in enumerate(self._groups):
            device, host = columns[number * len(TIERS) : (number + 1) * len(TIERS)]
            goes_on |= group.extend(device, host, stored[number], self._num_pages)
        self._num_pages += len(columns[0])
        return goes_on

    def lengths(self) -> dict[int, HeldPages]:
        """Return the pages held, by number, of the numbers that hold any."""
        found: dict[int, HeldPages] = {}
        for number, group in enumerate(self._groups):
            for place, held in group.lengths(self._num_pages).items():
                found[number * NUMBERS_PER_COLUMN + place] = held
        return found


class _Group:
    """Mutable; owned by its `PageRuns`."""

    def __init__(self) -> None:
        # The numbers that have every page so far: in the device pool; or in the host tier; or in the store.
        self._in_any = self._in_tiers = self._in_device = _ALL
        self._ended: dict[int, int] = {}  # the others: number of leading pages, above 0
        self._ended_in_tiers: dict[int, int] = {}
        self._ended_in_device: dict[int, int] = {}

    def add(self, device: int, host: int, stored: int, num_before: int) -> bool:
        """Take the bits of one page, or of several that are equal. Return whether a number has all."""
        held = device | host
        if self._in_device & ~device:
            _end(self._ended_in_device, self._in_device & ~device, num_before)
            self._in_device &= device
        if self._in_tiers & ~held:
            _end(self._ended_in_tiers, self._in_tiers & ~held, num_before)
            self._in_tiers &= held
        held |= stored
        if self._in_any & ~held:
            _end(self._ended, self._in_any & ~held, num_before)
            self._in_any &= held
        return bool(self._in_any)

    def extend(self, device: Bits, host: Bits, stored: Bits, num_before: int) -> bool:
        if not self._in_any:
            return False
        # Neighbouring pages mostly have the same holders: only the first of equal ones is looked at.
        differs = (device[1:] != device[:-1]) | (host[1:] != host[:-1]) | (stored[1:] != stored[:-1])
        for index in (0, *(np.flatnonzero(differs) + 1).tolist()):
            if not self.add(int(device[index]), int(host[index]), int(stored[index]), num_before + index):
                return False
        return True

    def lengths(self, num_pages: int) -> dict[int, HeldPages]:
        _end(self._ended, self._in_any, num_pages)
        _end(self._ended_in_tiers, self._in_tiers, num_pages)
        _end(self._ended_in_device, self._in_device, num_pages)
        found = {}
        for place, count in self._ended.items():
            num_device, num_held = self._ended_in_device.get(place, 0), self._ended_in_tiers.get(place, 0)
            found[place] = HeldPages(num_device, num_held - num_device, count - num_held)
        return found


def _end(ended: dict[int, int], bits: int, num_pages: int) -> None:
    """Record the numbers of these bits as ended after `num_pages`."""
    while bits and num_pages:
        place = bits.bit_length() - 1
        ended[place] = num_pages
        bits ^= 1 << place
