"""Counts the places of each API key: of its requests that run, or have pages and will run next.

Keys have equal shares of the places for equal weights. A key below its share comes first in the queue (waiting.py), and
may take the place of a request of a key above its own (victims.py).
"""

from __future__ import annotations

from kvist.fairness import weight_of


class Shares:
    """Mutable; its one owner is `Requests`. All counts are divided by the weight of the key."""

    def __init__(self) -> None:
        self._num_places: dict[str, int] = {}  # by key; no key has none

    def take(self, key: str) -> None:
        self._num_places[key] = self._num_places.get(key, 0) + 1

    def give_back(self, key: str) -> None:
        self._num_places[key] -= 1
        if not self._num_places[key]:
            del self._num_places[key]

    def with_more(self, key: str, num_more: int) -> float:
        """Return the places of the key, with `num_more` further ones."""
        return (self._num_places.get(key, 0) + num_more) / weight_of(key)

    def greatest_with_one_less(self) -> float:
        """Return the most places that a key would still have with one place less; below 0 if no key has a place."""
        return max((self.with_more(key, -1) for key in self._num_places), default=-1.0)
