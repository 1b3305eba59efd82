"""Common prefixes of prompts: the prefix tree of a batch, and the longest cached prefix of a prompt.

Sorted prompts are in depth-first order of their prefix tree, and the longest common prefix of a prompt with any of
them is the one with a neighbour. One sort and comparisons of neighbours replace a tree of characters.

Programs of a batch often share a beginning of many thousand characters. Characters that are `known` to be common are
not compared again for each prompt.
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


def common_beginning(prompts: Iterable[Prompt]) -> Prompt:
    """Return the longest beginning of all prompts."""
    first, length = Prompt(), None
    for prompt in prompts:
        if length is None:
            first, length = prompt, len(prompt.outline)
        elif not prompt.outline.startswith(first.outline[:length]):
            length = common_length(first.outline[:length], prompt.outline)
    return first.beginning(length or 0)


def depth_first(prompts: Iterable[tuple[int, Prompt]], *, known: int = 0) -> list[tuple[int, Prompt]]:
    """Return the prompts, each with its operation, in depth-first order of their prefix tree."""
    return sorted(prompts, key=lambda one: (one[1].outline[known:], one[0]))


def shared_prefixes(ordered: Sequence[tuple[int, Prompt]], *, least_chars: int, known: int = 0) -> list[SharedPrefix]:
    """Return the shared prefixes that add at least `least_chars` of text to the shared prefix above them; outer ones
    come first. `ordered` is in depth-first order."""
    found = _intervals([prompt.outline for _, prompt in ordered], known)
    found.sort(key=lambda interval: (interval[1], -interval[2], interval[0]))  # outer before inner, left before right
    nodes: list[SharedPrefix] = []
    ends: list[int] = []
    open_nodes: list[int] = []
    for length, first, last in found:
        while open_nodes and ends[open_nodes[-1]] < last:
            open_nodes.pop()
        prompt = ordered[first][1].beginning(length)
        parent = open_nodes[-1] if open_nodes else None
        above = None if parent is None else nodes[parent]
        num_own = prompt.num_chars_after(Prompt() if above is None else above.prompt)
        if num_own < least_chars:
            continue
        num_chars = num_own + (0 if above is None else above.num_chars)
        users = tuple(operation_id for operation_id, _ in ordered[first : last + 1])
        nodes.append(
            SharedPrefix(prompt=prompt, users=users, num_chars=num_chars, num_own_chars=num_own, parent=parent)
        )
        ends.append(last)
        open_nodes.append(len(nodes) - 1)
    return nodes


def _intervals(texts: Sequence[str], known: int) -> list[tuple[int, int, int]]:
    """Return (length, first, last) of each common beginning of two or more neighbours, as long and as wide as it is."""
    found: list[tuple[int, int, int]] = []
    stack: list[tuple[int, int]] = []  # (length, first), with growing lengths
    for index in range(1, len(texts) + 1):
        length = common_length(texts[index - 1], texts[index], known=known) if index < len(texts) else 0
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

    def __init__(self, outlines: Sequence[str] = (), *, shared: Prompt = Prompt()) -> None:
        """`outlines` are sorted. All prompts of the questions to come begin with `shared`."""
        start = shared.outline
        first = bisect_left(outlines, start)
        last = next((n for n in range(first, len(outlines)) if not outlines[n].startswith(start)), len(outlines))
        others = [outlines[n] for n in (first - 1, last) if 0 <= n < len(outlines)]
        self._num_shared = len(start)
        self._outlines = list(outlines[first:last])  # that begin with `shared`
        self._num_of_others = max((common_length(each, start) for each in others), default=0)

    def _index(self, prompt: Prompt) -> int:
        return bisect_left(self._outlines, self._tail(prompt.outline), key=self._tail)

    def _tail(self, outline: str) -> str:
        return outline[self._num_shared :]

    def add(self, prompt: Prompt) -> None:
        index = self._index(prompt)
        if index == len(self._outlines) or self._outlines[index] != prompt.outline:
            self._outlines.insert(index, prompt.outline)

    def longest(self, prompt: Prompt) -> Prompt:
        """Return the longest beginning of `prompt` that is cached."""
        index, known = self._index(prompt), self._num_shared
        lengths = [
            common_length(each, prompt.outline, known=known) for each in self._outlines[max(index - 1, 0) : index + 1]
        ]
        return prompt.beginning(max(lengths, default=self._num_of_others))


class RememberedPrefixes:
    """Which worker computed which prompts last, as a client knows it: the latest `most` of each worker. Mutable."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._sorted: dict[str, list[str]] = {}  # by worker
        self._keys: dict[str, list[bytes]] = {}  # of `_sorted`, in UTF-8: in the same order, and quicker to compare
        self._order: dict[str, deque[bytes]] = {}

    def add(self, worker: str, prompt: Prompt) -> None:
        outlines, keys = self._sorted.setdefault(worker, []), self._keys.setdefault(worker, [])
        order = self._order.setdefault(worker, deque())
        key = prompt.outline.encode("utf-8", "surrogatepass")
        index = bisect_left(keys, key)
        if index < len(keys) and keys[index] == key:
            return
        outlines.insert(index, prompt.outline)
        keys.insert(index, key)
        order.append(key)
        if len(order) > self._most:
            oldest = bisect_left(keys, order.popleft())
            del outlines[oldest], keys[oldest]

    def snapshot(self) -> dict[str, tuple[str, ...]]:
        """Return the outlines of each worker, sorted."""
        return {worker: tuple(outlines) for worker, outlines in self._sorted.items()}
