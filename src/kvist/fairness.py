"""Turns among callers: who is next in a queue, and who gives way when it is full. Pure.

A caller has a path of three names, the most general first: its API key, its host, its connection. Keys take turns;
the hosts of one key take turns with what the key gets; so do the connections of one host. A flood of requests, or of
connections, thus leaves its share to everybody else. The names are opaque here: server/caller.py makes them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

CallerPath = tuple[str, str, str]
Item = TypeVar("Item")
_DEPTH = 3


def caller_path(tag: str) -> CallerPath:
    """Of `EngineRequest.client`: names with slashes between them; missing ones are empty."""
    key, host, connection, *_ = [*tag.split("/", _DEPTH), "", ""]
    return key, host, connection


@dataclass(slots=True)
class _Level(Generic[Item]):
    below: OrderedDict[str, _Level[Item]] = field(default_factory=OrderedDict)  # in the order of their turns
    items: list[Item] = field(default_factory=list)  # of a connection, in order

    def __iter__(self) -> Iterator[Item]:
        yield from self.items
        for level in self.below.values():
            yield from level


class FairQueue(Generic[Item]):
    """Items of many callers, each caller's own in the order of `order`. Mutable; its one owner is a queue."""

    def __init__(self, order: Callable[[Item], int]) -> None:
        self._order = order
        self._top: _Level[Item] = _Level()

    def __iter__(self) -> Iterator[Item]:
        return iter(self._top)

    def add(self, caller: CallerPath, item: Item) -> None:
        """A caller that had nothing here comes last in this round."""
        level = self._top
        for name in caller:
            level = level.below.setdefault(name, _Level())
        insort(level.items, item, key=self._order)

    def head(self) -> Item | None:
        """The same until it is taken or removed, or an older one of its caller is added."""
        level = self._top
        while level.below:
            level = next(iter(level.below.values()))
        return level.items[0] if level.items else None

    def remove(self, caller: CallerPath, item: Item) -> None:
        """Nobody's turn has passed."""
        levels = self._levels(caller)
        items = levels[-1].items
        place = bisect_left(items, self._order(item), key=self._order)
        assert items[place] is item
        del items[place]
        for level, name in zip(levels[-2::-1], caller[::-1], strict=True):
            if not level.below[name].items and not level.below[name].below:
                del level.below[name]

    def take(self, caller: CallerPath, item: Item) -> None:
        """Remove it: that was its caller's turn."""
        levels = self._levels(caller)
        self.remove(caller, item)
        for level, name in zip(levels, caller, strict=False):
            if name in level.below:
                level.below.move_to_end(name)

    def _levels(self, caller: CallerPath) -> list[_Level[Item]]:
        levels = [self._top]
        for name in caller:
            levels.append(levels[-1].below[name])
        return levels


class CallerCounts:
    """How many of some places each caller has. Mutable; its one owner counts them.

    Asked for each request that finds a queue full, so nothing here looks at every place."""

    def __init__(self) -> None:
        self._below: dict[tuple[str, ...], dict[str, int]] = {}  # a key's, or a key and host's → of each name below it

    def add(self, caller: CallerPath) -> None:
        for depth in range(_DEPTH):
            counts = self._below.setdefault(caller[:depth], {})
            counts[caller[depth]] = counts.get(caller[depth], 0) + 1

    def remove(self, caller: CallerPath) -> None:
        for depth in range(_DEPTH):
            counts = self._below[caller[:depth]]
            counts[caller[depth]] -= 1
            if not counts[caller[depth]]:
                del counts[caller[depth]]
            if not counts:
                del self._below[caller[:depth]]

    def displaced_by(self, newcomer: CallerPath) -> CallerPath | None:
        """Who should lose a place to the newcomer; None: nobody.

        A key gives way when it would still have more than the newcomer's afterwards; among the hosts of one key, and
        the connections of one host, the same. So two callers can never push each other out in turn."""
        for depth in range(_DEPTH):
            counts = self._below.get(newcomer[:depth], {})
            most = max(counts.values(), default=0)
            if most >= counts.get(newcomer[depth], 0) + 2:
                return self._heaviest_below(newcomer[:depth])
        return None

    def _heaviest_below(self, prefix: tuple[str, ...]) -> CallerPath:
        while len(prefix) < _DEPTH:
            counts = self._below[prefix]
            prefix = (*prefix, max(counts, key=counts.__getitem__))
        key, host, connection = prefix
        return key, host, connection
