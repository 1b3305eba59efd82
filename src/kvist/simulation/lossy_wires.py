"""Wires between processes: first in, first out between two of them, any order between different pairs.

A message can be lost with its sender, or arrive twice. A test chooses the wire that delivers next, and thereby the
order of messages of different pairs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from typing import Generic, TypeVar

Message = TypeVar("Message")
Wire = tuple[str, str]  # source, target


class LossyWires(Generic[Message]):
    """The messages under way on every wire. Mutable; owned by the test's cluster. Iterates over the wires used."""

    def __init__(self) -> None:
        self._queues: dict[Wire, deque[Message]] = {}

    def __iter__(self) -> Iterator[Wire]:
        return iter(list(self._queues))

    def send(self, source: str, target: str, message: Message) -> None:
        self._queues.setdefault((source, target), deque()).append(message)

    def num_waiting(self, wire: Wire) -> int:
        return len(self._queues.get(wire, ()))

    def waiting(self) -> list[Wire]:
        """Return the wires with messages, sorted."""
        return sorted(wire for wire, queue in self._queues.items() if queue)

    def take(self, wire: Wire) -> Message | None:
        """Return the oldest message of the wire, or None if none is under way."""
        queue = self._queues.get(wire)
        return queue.popleft() if queue else None

    def repeat(self, wire: Wire, message: Message, *, at_once: bool) -> None:
        """Let a message that was taken arrive again: next, or after those under way."""
        queue = self._queues[wire]
        queue.appendleft(message) if at_once else queue.append(message)

    def cut(self, source: str, *, keep: Collection[str] = ()) -> None:
        """Lose all messages of this sender, except those to the targets in `keep`."""
        for wire, queue in self._queues.items():
            if wire[0] == source and wire[1] not in keep:
                queue.clear()
