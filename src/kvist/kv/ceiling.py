"""What a cache that forgets nothing would have hit: the names of the pages that this one had and evicted.

    evicted from the device pool ──remember──► known ──► too many: the one of its row unused for longest is forgotten
                                                  └──► flush: all are

A page that was ever cached is in the tree, or in the host tier, or was evicted. So what an infinite cache would have
had of a prompt is what was found in the tiers, and after it the leading pages whose digests are known here: exactly,
until one has been forgotten; from then on it is a lower bound.

It costs 16 MiB, one look-up for each page that is evicted (1.7 µs) and one, at admission, for each page that would have
been found (0.9 µs). The table is rows of 16 entries, each 8 bytes of a digest, the newest first: no step waits until
something has been resized. Rows fill unevenly: the first digest is forgotten when 600,000 are known, and of a million
one in 2,000 is.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_DIGESTS = 1 << 21
_ENTRY_BYTES = 8
_ROW_ENTRIES = 16  # two lines of a CPU's cache: its misses are most of the cost
_ROW_BYTES = _ROW_ENTRIES * _ENTRY_BYTES
_EMPTY = bytes(_ENTRY_BYTES)


class EvictionHistory:
    """Mutable; its one owner is `PageCache`."""

    def __init__(self, max_digests: int = MAX_DIGESTS) -> None:
        assert max_digests > 0
        assert max_digests % _ROW_ENTRIES == 0
        self._num_rows = max_digests // _ROW_ENTRIES
        self.num_remembered = 0  # each digest once, until it is forgotten
        self.num_forgotten = 0  # of these: there were too many
        self.clear()

    def remember(self, digest: bytes) -> None:
        """It was evicted just now."""
        table, entry, start = self._table, digest[:_ENTRY_BYTES], self._row(digest)
        end = start + _ROW_BYTES
        # A match across two entries is as unlikely as one of two different digests.
        at = table.find(entry, start, end)
        if at < 0:
            at = end - _ENTRY_BYTES
            self.num_remembered += 1
            self.num_forgotten += table[at:end] != _EMPTY
        table[start : at + _ENTRY_BYTES] = entry + table[start:at]

    def num_leading(self, digests: Iterable[bytes]) -> int:
        """How many are known, up to the first that is not."""
        table, count = self._table, 0
        for digest in digests:
            start = self._row(digest)
            if table.find(digest[:_ENTRY_BYTES], start, start + _ROW_BYTES) < 0:
                break
            count += 1
        return count

    def clear(self) -> None:
        """As if nothing had ever been cached."""
        self._table = bytearray(self._num_rows * _ROW_BYTES)

    def _row(self, digest: bytes) -> int:
        return hash(digest) % self._num_rows * _ROW_BYTES
