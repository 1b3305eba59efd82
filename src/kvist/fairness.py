"""Fair turns among callers: which request is next in a queue, and which is displaced when the queue is full. Pure.

A caller has a path of three names, the most general first: its API key, its host, its connection. Keys take turns;
within the turns of a key its hosts take turns, and within those of a host its connections. A flood of requests or of
connections thus leaves all other callers their share. The names are opaque here: http/caller.py makes them.
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
    """Split `EngineRequest.client` at its slashes; missing names are empty."""
    key, host, connection, *_ = [*tag.split("/", _DEPTH), "", ""]
    return key, host, connection


@dataclass(slots=True)
class _Level(Generic[Item]):
    below: OrderedDict[str, _Level[Item]] = field(default_factory=OrderedDict)  # in the order of their turns
    items: list[Item] = field(default_factory=list)  # only at the lowest level: of one connection, in order

    def __iter__(self) -> Iterator[Item]:
        yield from self.items
        for level in self.below.values():
            yield from level


class FairQueue(Generic[Item]):
    """A queue in which callers take turns; each caller's items are sorted by `order`. Mutable, with one owner."""

    def __init__(self, order: Callable[[Item], int]) -> None:
        self._order = order
        self._top: _Level[Item] = _Level()

    def __iter__(self) -> Iterator[Item]:
        return iter(self._top)

    def add(self, caller: CallerPath, item: Item) -> None:
        """Queue an item. A caller without queued items comes last in this round."""
        level = self._top
        for name in caller:
            level = level.below.setdefault(name, _Level())
        insort(level.items, item, key=self._order)

    def head(self) -> Item | None:
        """Return the next item: the same until it is taken or removed, or an older item of its caller is added."""
        level = self._top
        while level.below:
            level = next(iter(level.below.values()))
        return level.items[0] if level.items else None

    def remove(self, caller: CallerPath, item: Item) -> None:
        """Remove an item without using up its caller's turn."""
        levels = self._levels(caller)
        items = levels[-1].items
        place = bisect_left(items, self._order(item), key=self._order)
        assert items[place] is item
        del items[place]
        for level, name in zip(levels[-2::-1], caller[::-1], strict=True):
            if not level.below[name].items and not level.below[name].below:
                del level.below[name]

    def take(self, caller: CallerPath, item: Item) -> None:
        """Remove an item and use up its caller's turn: other callers come first in the next round."""
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
    """Counts the places in a queue by caller. Mutable, with one owner.

    Used for each request that meets a full queue: no method scans all places."""

    def __init__(self) -> None:
        self._below: dict[tuple[str, ...], dict[str, int]] = {}  # path prefix → count by the next name

    def __len__(self) -> int:
        """The number of places of all callers."""
        return sum(self._below.get((), {}).values())

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
        """Return the caller that loses a place to the newcomer; None if the newcomer displaces no one.

        A key is displaced if afterwards it still has at least as many places as the newcomer's key. The same rule
        holds among the hosts of one key, and among the connections of one host. Thus two callers can never displace
        each other in turn."""
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
