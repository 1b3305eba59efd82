"""Common prefixes of prompts: the prefix tree of a batch, and the longest cached prefix of a prompt.

Sorted prompts are in depth-first order of their prefix tree, and the longest common prefix of a prompt with any of
them is the one with a neighbour. One sort and comparisons of neighbours replace a tree of characters.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvist.planning.prompt import Prompt, common_length


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """A node of the prefix tree with at least two users below it."""

    prompt: Prompt
    users: tuple[int, ...]  # operation ids, in depth-first order
    num_chars: int  # of text
    num_own_chars: int  # beyond the shared prefix above it
    parent: int | None  # index of the shared prefix above it, which comes earlier in the list


def depth_first(prompts: Iterable[tuple[int, Prompt]]) -> list[tuple[int, Prompt]]:
    """Return the prompts, each with its operation, in depth-first order of their prefix tree."""
    return sorted(prompts, key=lambda one: (one[1].outline, one[0]))


def shared_prefixes(ordered: Sequence[tuple[int, Prompt]], *, least_chars: int) -> list[SharedPrefix]:
    """Return the shared prefixes that add at least `least_chars` of text to the shared prefix above them; outer ones
    come first. `ordered` is in depth-first order."""
    found = _intervals([prompt.outline for _, prompt in ordered])
    found.sort(key=lambda interval: (interval[1], -interval[2], interval[0]))  # outer before inner, left before right
    nodes: list[SharedPrefix] = []
    ends: list[int] = []
    open_nodes: list[int] = []
    for length, first, last in found:
        while open_nodes and ends[open_nodes[-1]] < last:
            open_nodes.pop()
        prompt = ordered[first][1].beginning(length)
        parent = open_nodes[-1] if open_nodes else None
        num_chars = prompt.num_chars
        num_own = num_chars - (0 if parent is None else nodes[parent].num_chars)
        if num_own < least_chars:
            continue
        users = tuple(operation_id for operation_id, _ in ordered[first : last + 1])
        nodes.append(
            SharedPrefix(prompt=prompt, users=users, num_chars=num_chars, num_own_chars=num_own, parent=parent)
        )
        ends.append(last)
        open_nodes.append(len(nodes) - 1)
    return nodes


def _intervals(texts: Sequence[str]) -> list[tuple[int, int, int]]:
    """Return (length, first, last) of each common beginning of two or more neighbours, as long and as wide as it is."""
    found: list[tuple[int, int, int]] = []
    stack: list[tuple[int, int]] = []  # (length, first), with growing lengths
    for index in range(1, len(texts) + 1):
        length = common_length(texts[index - 1], texts[index]) if index < len(texts) else 0
        first = index - 1
        while stack and stack[-1][0] > length:
            longer, first = stack.pop()
            found.append((longer, first, index - 1))
        if length and (not stack or stack[-1][0] < length):
            stack.append((length, first))
    return found


class CachedPrompts:
    """The prompts that one worker has cached, for the question how much of another prompt is cached. Mutable; owned by
    one call of the planner."""

    def __init__(self, outlines: Sequence[str] = ()) -> None:
        """`outlines` are sorted."""
        self._outlines = list(outlines)

    def add(self, prompt: Prompt) -> None:
        index = bisect_left(self._outlines, prompt.outline)
        if index == len(self._outlines) or self._outlines[index] != prompt.outline:
            self._outlines.insert(index, prompt.outline)

    def longest(self, prompt: Prompt) -> Prompt:
        """Return the longest beginning of `prompt` that is cached."""
        index = bisect_left(self._outlines, prompt.outline)
        neighbours = self._outlines[max(index - 1, 0) : index + 1]
        return prompt.beginning(max((common_length(each, prompt.outline) for each in neighbours), default=0))


class RememberedPrefixes:
    """Which worker computed which prompts last, as a client knows it: the latest `most` of each worker. Mutable."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._sorted: dict[str, list[str]] = {}  # by worker
        self._order: dict[str, deque[str]] = {}

    def add(self, worker: str, prompt: Prompt) -> None:
        outlines, order = self._sorted.setdefault(worker, []), self._order.setdefault(worker, deque())
        index = bisect_left(outlines, prompt.outline)
        if index < len(outlines) and outlines[index] == prompt.outline:
            return
        outlines.insert(index, prompt.outline)
        order.append(prompt.outline)
        if len(order) > self._most:
            oldest = order.popleft()
            del outlines[bisect_left(outlines, oldest)]

    def snapshot(self) -> dict[str, tuple[str, ...]]:
        """Return the outlines of each worker, sorted."""
        return {worker: tuple(outlines) for worker, outlines in self._sorted.items()}
