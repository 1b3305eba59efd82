"""Finds stop strings in a text that arrives in pieces. One instance for each stream; its owner pushes all text.

Text that may be the beginning of a stop string is withheld until that is decided. The cut is before the stop string
that is complete first (of those complete at the same character, the one that began first), so the result does not
depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._pending = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that may be shown now. After a match: what stood before it, then nothing more."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        text = self._pending + text
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            _, start, self.matched = min(ends)
            self._pending = ""
            return text[:start]
        shown = len(text) - self._num_withheld(text)
        self._pending = text[shown:]
        return text[:shown]

    def _num_withheld(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[start:]
            if any(stop.startswith(tail) for stop in self._stops):
                return len(tail)
        return 0

    def flush(self) -> str:
        """The stream is over: what was withheld is ordinary text."""
        rest, self._pending = self._pending, ""
        return rest
