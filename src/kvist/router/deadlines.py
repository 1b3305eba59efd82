"""PURE. Deadlines of several kinds; all deadlines of one kind are equally far away when they are set.

Each kind thus keeps its deadlines in the order in which they were set: setting, cancelling and finding the first one
take constant time, and a cancelled deadline leaves nothing behind.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

Kind = TypeVar("Kind", bound=Hashable)
Item = TypeVar("Item", bound=Hashable)


class Deadlines(Generic[Kind, Item]):
    """Mutable, with one owner, which never sets `now_s` back."""

    def __init__(self, after_s: Mapping[Kind, float]) -> None:
        """`after_s`: the time from setting a deadline of each kind until it is due."""
        self._after_s = after_s
        self._due_s: dict[Kind, OrderedDict[Item, float]] = {kind: OrderedDict() for kind in after_s}

    def __len__(self) -> int:
        return sum(map(len, self._due_s.values()))

    def set(self, kind: Kind, item: Item, now_s: float) -> None:
        """Set the item's deadline of this kind; an earlier one is replaced."""
        due_s = self._due_s[kind]
        due_s.pop(item, None)
        due_s[item] = now_s + self._after_s[kind]

    def cancel(self, kind: Kind, item: Item) -> None:
        self._due_s[kind].pop(item, None)

    def next_s(self) -> float | None:
        """Return the time of the first deadline; None if there is none."""
        heads = [next(iter(due_s.values())) for due_s in self._due_s.values() if due_s]
        return min(heads, default=None)

    def take_due(self, kind: Kind, now_s: float, *, most: int | None = None) -> list[Item]:
        """Remove and return the items whose deadline has come, the oldest first, and at most `most` of them."""
        due_s, found = self._due_s[kind], list[Item]()
        while due_s and (most is None or len(found) < most):
            item, at_s = next(iter(due_s.items()))
            if at_s > now_s:
                break
            del due_s[item]
            found.append(item)
        return found
