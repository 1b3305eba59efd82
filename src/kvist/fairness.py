"""Fair turns among callers: which request is next in a queue, and which is displaced when the queue is full. Pure.

A caller has a path of three names, the most general first: its API key, its host, its connection. Keys take turns;
within the turns of a key its hosts take turns, and within those of a host its connections. A flood of requests or of
connections thus leaves all other callers their share. The names are opaque here: http/caller.py makes them.

The name of a key may end with its weight, as `NAME:4`: this key gets four turns, and four places in a queue, for one of
a key of weight 1. Each key has a due time on a clock of turns: a turn moves it by 1 / weight, the key with the least
due time is next, and a key that joins is due one turn of its own after the last turn that was taken.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil
from typing import Generic, TypeVar

CallerPath = tuple[str, str, str]
Item = TypeVar("Item")
_DEPTH = 3
MAX_WEIGHT = 1000
_WEIGHT_MARK = ":"


def caller_path(tag: str) -> CallerPath:
    """Split `EngineRequest.client` at its slashes; missing names are empty."""
    key, host, connection, *_ = [*tag.split("/", _DEPTH), "", ""]
    return key, host, connection


def weighted_name(name: str, weight: int) -> str:
    """Return the name of an API key of this weight, for a caller path."""
    return name if weight == 1 else f"{name}{_WEIGHT_MARK}{weight}"


@lru_cache(maxsize=4096)
def weight_of(key: str) -> int:
    """Return the weight of an API key, at least 1, from its name in a caller path."""
    digits = key.rpartition(_WEIGHT_MARK)[2] if _WEIGHT_MARK in key else ""
    return min(MAX_WEIGHT, max(1, int(digits))) if digits.isascii() and digits.isdigit() and len(digits) <= 4 else 1


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
        self._due: dict[str, float] = {}  # of each key with items: the time of its next turn, on the clock of turns
        self._turn_time = 0.0  # of the last turn

    def __iter__(self) -> Iterator[Item]:
        return iter(self._top)

    def add(self, caller: CallerPath, item: Item) -> None:
        """Queue an item. A caller without queued items comes last in this round."""
        level = self._top
        if caller[0] not in level.below:
            self._due[caller[0]] = self._turn_time + 1 / weight_of(caller[0])
        for name in caller:
            level = level.below.setdefault(name, _Level())
        insort(level.items, item, key=self._order)

    @property
    def keys(self) -> Iterable[str]:
        """The API keys with items, in the order of their last turns."""
        return self._top.below

    def head(self, key: str | None = None) -> Item | None:
        """Return the next item, or that of one key with items: the same until it is taken or removed, or an older item
        of its caller is added."""
        level = self._top
        if level.below:
            chosen = min(level.below, key=self._due.__getitem__) if key is None else key  # of equal ones the first
            level = level.below[chosen]
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
        if caller[0] not in self._top.below:
            del self._due[caller[0]]

    def take(self, caller: CallerPath, item: Item) -> None:
        """Remove an item and use up its caller's turn: other callers come first in the next round."""
        levels, key = self._levels(caller), caller[0]
        self._turn_time = self._due[key]
        self.remove(caller, item)
        if key in self._due:
            self._due[key] += 1 / weight_of(key)
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

        A key is displaced if afterwards it still has at least as many places for its weight as the newcomer's key. The
        same rule holds among the hosts of one key, and among the connections of one host. Thus two callers can never
        displace each other in turn."""
        for depth in range(_DEPTH):
            counts, name = self._below.get(newcomer[:depth], {}), newcomer[depth]
            most = max((_share(depth, each, count - 1) for each, count in counts.items()), default=-1.0)
            if most >= _share(depth, name, counts.get(name, 0) + 1):
                return self._heaviest_below(newcomer[:depth])
        return None

    def heaviest(self) -> CallerPath | None:
        """Return the caller that has the most places for its weight; None if no place is taken."""
        return self._heaviest_below(()) if self._below else None

    def num_ahead(self, newcomer: CallerPath) -> int:
        """Return how many of the places are served before one more place of the newcomer, if each place is one turn and
        all callers are at the begin of a round."""
        place = 1 + self._count(newcomer, _DEPTH - 1)  # among the places of its connection, then of its host and key
        for depth in reversed(range(_DEPTH)):
            counts, name = self._below.get(newcomer[:depth], {}), newcomer[depth]
            own = weight_of(name) if depth == 0 else 1
            place += sum(
                min(count, ceil(place * (weight_of(other) if depth == 0 else 1) / own))
                for other, count in counts.items()
                if other != name
            )
        return place - 1

    def _count(self, caller: CallerPath, depth: int) -> int:
        return self._below.get(caller[:depth], {}).get(caller[depth], 0)

    def _heaviest_below(self, prefix: tuple[str, ...]) -> CallerPath:
        while len(prefix) < _DEPTH:
            counts, depth = self._below[prefix], len(prefix)
            prefix = (*prefix, max(counts, key=lambda name: _share(depth, name, counts[name] - 1)))
        key, host, connection = prefix
        return key, host, connection


def _share(depth: int, name: str, num_places: int) -> float:
    """Return the number of places for the weight of the name; only keys have weights."""
    return num_places / weight_of(name) if depth == 0 else float(num_places)
