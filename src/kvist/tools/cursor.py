"""Reads a text that arrives in pieces. A method that needs more text yields and continues after the next `push`.

Each decision depends on the text only, never on the cuts: a method waits until every possible continuation would lead
to the same result, or the text has ended.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from functools import cache
from typing import TypeVar

T = TypeVar("T")
Waiting = Generator[None, None, T]

HELD_CHARS = 1 << 16  # withheld at most for one name, value or call; longer text is not a call
MAX_SPACE_CHARS = 1024  # of one run of white space around a call
_MAX_NAME_CHARS = 256
_NAME = re.compile(r"[\w.:/-]*")
_NO_SPACE = re.compile(r"\S")


class MalformedCallError(Exception):
    """The text is not a call. The cursor stands where that became certain."""


class Cursor:
    def __init__(self) -> None:
        self.text = ""  # begins with the first withheld character
        self.at = 0  # [0, at) is withheld, [at, len) is unread
        self.ended = False

    def push(self, text: str) -> None:
        self.text += text

    def commit(self) -> str:
        """Return the withheld text, and withhold nothing."""
        held, self.text, self.at = self.text[: self.at], self.text[self.at :], 0
        return held

    def char(self) -> Waiting[str]:
        """Return the next character without reading it, or "" at the end of the text."""
        while self.at >= len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def skip_space(self) -> Waiting[None]:
        first = self.at
        limit = first + MAX_SPACE_CHARS
        while True:
            found = _NO_SPACE.search(self.text, self.at, limit)
            self.at = min(len(self.text), limit) if found is None else found.start()
            if found is not None or (self.ended and self.at < limit):
                return
            if self.at == limit:
                raise MalformedCallError
            yield

    def take_any(self, markers: Sequence[str]) -> Waiting[str]:
        """Read the longest marker with which the text continues, and return it; "" when there is none."""
        longest = max(map(len, markers), default=0)
        while True:
            rest = self.text[self.at : self.at + longest]
            may_grow = any(len(rest) < len(marker) and marker.startswith(rest) for marker in markers)
            if self.ended or not may_grow:
                break
            yield
        found = max((marker for marker in markers if rest.startswith(marker)), key=len, default="")
        self.at += len(found)
        return found

    def expect(self, markers: Sequence[str]) -> Waiting[str]:
        found = yield from self.take_any(markers)
        if not found:
            raise MalformedCallError
        return found

    def name(self) -> Waiting[str]:
        """Read the name of a function."""
        first = self.at
        while True:
            found = _NAME.match(self.text, self.at, first + _MAX_NAME_CHARS + 1)
            self.at = self.at if found is None else found.end()
            if self.ended or self.at < len(self.text) or self.at - first > _MAX_NAME_CHARS:
                break
            yield
        name = self.text[first : self.at]
        if not is_name(name):
            raise MalformedCallError
        return name

    def until(self, ends: Sequence[str], most_chars: int) -> Waiting[tuple[str, str]]:
        """Read up to the first of `ends`, of which none begins with another one, and over it. Return the text before
        the end, and the end."""
        pattern, longest = any_of(ends), max(map(len, ends))
        first = searched = self.at
        limit = first + most_chars
        while True:
            found = pattern.search(self.text, searched, limit + longest)
            if found is not None and found.start() <= limit:
                self.at = found.end()
                return self.text[first : found.start()], found[0]
            if len(self.text) >= limit + longest:
                self.at = limit
                raise MalformedCallError
            if self.ended:
                self.at = len(self.text)
                raise MalformedCallError
            searched = max(first, len(self.text) - longest + 1)
            yield

    def decided(self, ends: Sequence[str]) -> tuple[int, str]:
        """Return the index up to which the unread text certainly precedes the first of `ends`, and that end if it is
        complete."""
        found = any_of(ends).search(self.text, self.at)
        if found is not None:
            return found.start(), found[0]
        return len(self.text) if self.ended else self.cut_end(ends), ""

    def cut_end(self, ends: Sequence[str]) -> int:
        """Return the index at which the text may have been cut inside of one of `ends`; its length if it was not."""
        first_chars, longest = _first_chars(tuple(ends)), max(map(len, ends))
        for start in range(max(self.at, len(self.text) - longest + 1), len(self.text)):
            if self.text[start] in first_chars and any(end.startswith(self.text[start:]) for end in ends):
                return start
        return len(self.text)


def is_name(text: str) -> bool:
    return 0 < len(text) <= _MAX_NAME_CHARS and _NAME.fullmatch(text) is not None


@cache
def _first_chars(ends: tuple[str, ...]) -> frozenset[str]:
    return frozenset(end[0] for end in ends)


@cache
def _any_of(ends: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))))


def any_of(ends: Sequence[str]) -> re.Pattern[str]:
    return _any_of(tuple(ends))


class Reading:
    """A parse of text that comes in pieces: it goes on when more text is there."""

    def __init__(self, steps: Waiting[None]) -> None:
        self._steps = steps
        self.is_done = False

    def go_on(self) -> None:
        """Parse until more text is needed, or the parse is done."""
        if not self.is_done:
            try:
                next(self._steps)
            except StopIteration:
                self.is_done = True
