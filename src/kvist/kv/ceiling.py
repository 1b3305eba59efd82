"""The digests of evicted pages, to count the ceiling: the hits that an infinite cache would have had.

    evicted from the device pool ──remember──► known ──► its row is full: the row's oldest digest is forgotten
                                                  └──► flush: all digests are forgotten

A page that was ever cached is in the tree, is in the host tier, or was evicted. The ceiling of a prompt is therefore
the number of pages found in the tiers plus the number of leading pages after them whose digests are known here. The
ceiling is exact until the first digest is forgotten, and a lower bound from then on.

The table costs up to 16 MiB, one look-up for each evicted page (1.7 µs) and, at admission, one for each page of the
ceiling that is missing in the tiers (0.9 µs). A row has 16 entries of 8 bytes of a digest, the newest first; the table
has a fixed size, so no step waits for a resize. Rows fill unevenly: the first digest is forgotten when about 600,000
are known; of a million digests, one in 2,000 is forgotten.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

MAX_DIGESTS = 1 << 21
_ENTRY_BYTES = 8
_ROW_ENTRIES = 16  # a row is two cache lines of the CPU; cache misses are most of the cost
_ROW_BYTES = _ROW_ENTRIES * _ENTRY_BYTES
_EMPTY = bytes(_ENTRY_BYTES)


class EvictionHistory:
    """The table of evicted digests. Mutable; its one owner is `PageCache`."""

    def __init__(self, max_digests: int = MAX_DIGESTS) -> None:
        assert max_digests > 0
        assert max_digests % _ROW_ENTRIES == 0
        self._num_rows = max_digests // _ROW_ENTRIES
        self.num_remembered = 0  # each digest once, unless it was forgotten since
        self.num_forgotten = 0  # digests dropped from a full row
        self.clear()

    def remember(self, digest: bytes) -> None:
        """Enter the digest of a page that was just evicted."""
        table, entry, start = self._table, digest[:_ENTRY_BYTES], self._row(digest)
        end = start + _ROW_BYTES
        # A match across two entries is as unlikely as two digests with equal entries.
        at = table.find(entry, start, end)
        if at < 0:
            at = end - _ENTRY_BYTES
            self.num_remembered += 1
            self.num_forgotten += table[at:end] != _EMPTY
        table[start : at + _ENTRY_BYTES] = entry + table[start:at]

    def num_leading(self, digests: Iterable[bytes]) -> int:
        """Return how many leading digests are known."""
        table, count = self._table, 0
        for digest in digests:
            start = self._row(digest)
            if table.find(digest[:_ENTRY_BYTES], start, start + _ROW_BYTES) < 0:
                break
            count += 1
        return count

    def clear(self) -> None:
        """Forget all digests, as if no page had ever been cached."""
        # Unlike a bytearray, takes memory only for the rows that are written.
        self._table = mmap.mmap(-1, self._num_rows * _ROW_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _row(self, digest: bytes) -> int:
        return hash(digest) % self._num_rows * _ROW_BYTES
