"""The net changes of one tier's pages between two reports.

A page that enters and leaves the tier between two reports is in neither report: a reader that applies every report has
the tier's pages as of the last report.
"""

from __future__ import annotations

from kvist.wire import PageEvents, PageTier


class PageChanges:
    """Mutable; owned by the tier's index (radix.py, tiers/host.py) or by the load reports (engine/reports.py)."""

    def __init__(self, tier: PageTier) -> None:
        self._tier = tier
        # Dicts for their order. A digest is in at most one of the two: its changes alternate.
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    def on_stored(self, digest: bytes) -> None:
        if digest in self._removed:
            del self._removed[digest]
        else:
            self._stored[digest] = None

    def on_removed(self, digest: bytes) -> None:
        if digest in self._stored:
            del self._stored[digest]
        else:
            self._removed[digest] = None

    def __bool__(self) -> bool:
        return bool(self._stored or self._removed)

    def take(self) -> tuple[PageEvents, ...]:
        """Return the changes since the last call as one event, or as none if nothing changed."""
        if not self:
            return ()
        event = PageEvents(tier=self._tier, stored=tuple(self._stored), removed=tuple(self._removed))
        self._stored, self._removed = {}, {}
        return (event,)
