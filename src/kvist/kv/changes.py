"""The pages of one tier as others see them: the net changes since the last step, and the list of all pages.

A page that enters and leaves the tier between two calls of `take` is in neither: a reader that applies every change has
the tier's pages as of the last call.

The list is kept in rows, in pieces of `MAX_DIGESTS` rows. A page keeps its row as long as it is in the tier. A reader
can therefore take the pieces one by one while pages enter and leave: a page that stays is in its piece, and the changes
since the piece was taken are the truth about all others.
"""

from __future__ import annotations

import struct

import numpy as np

from kvist.plan.plan import ChangedPages
from kvist.wire import DIGEST_BYTES, MAX_DIGESTS, PageTier

_ROW = struct.Struct(f"{DIGEST_BYTES}s")  # cuts a digest to this length
_NO_PAGE = bytes(DIGEST_BYTES)


class PageChanges:
    """Mutable; owned by the tier's index (radix.py, tiers/host.py)."""

    def __init__(self, tier: PageTier) -> None:
        self._tier: PageTier = tier
        # Dicts for their order. A digest is in at most one of the two: its changes alternate.
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}
        self._pieces: list[bytearray] = []
        self._free_rows: list[int] = []

    def on_stored(self, digest: bytes) -> int:
        """Record a page that entered. Return its row, for `on_removed`."""
        if digest in self._removed:
            del self._removed[digest]
        else:
            self._stored[digest] = None
        if not self._free_rows:
            self._add_piece()
        row = self._free_rows.pop()
        self._write(row, digest)
        return row

    def on_removed(self, digest: bytes, row: int) -> None:
        if digest in self._stored:
            del self._stored[digest]
        else:
            self._removed[digest] = None
        self._write(row, _NO_PAGE)
        self._free_rows.append(row)

    def take(self) -> tuple[ChangedPages, ...]:
        """Return the changes since the last call, as one value, or none if nothing changed."""
        if not self._stored and not self._removed:
            return ()
        changed = ChangedPages(tier=self._tier, stored=tuple(self._stored), removed=tuple(self._removed))
        self._stored, self._removed = {}, {}
        return (changed,)

    @property
    def num_pieces(self) -> int:
        return len(self._pieces)

    def piece(self, number: int) -> bytes:
        """Return the digests in one piece of the list, each cut to `DIGEST_BYTES`."""
        rows = np.frombuffer(self._pieces[number], dtype="<u8").reshape(-1, DIGEST_BYTES // 8)
        digests: bytes = rows[(rows != 0).any(axis=1)].tobytes()
        return digests

    def _add_piece(self) -> None:
        first = len(self._pieces) * MAX_DIGESTS
        self._pieces.append(bytearray(MAX_DIGESTS * DIGEST_BYTES))
        self._free_rows = list(range(first + MAX_DIGESTS - 1, first - 1, -1))

    def _write(self, row: int, digest: bytes) -> None:
        number, place = divmod(row, MAX_DIGESTS)
        _ROW.pack_into(self._pieces[number], place * DIGEST_BYTES, digest)
