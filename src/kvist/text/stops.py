"""Finds stop strings in a text that arrives in pieces. One instance per stream; its owner pushes all text.

Text that may begin a stop string is withheld until more text decides. The text is cut at the stop string that is
complete first; of several that are complete at the same character, the one that began first wins. The result therefore
does not depend on how the text was split into pieces.

A stop string may spell special tokens, which the text does not contain. In the pushed text and in the searched stop
string, a mark replaces each such token: a lone surrogate, a character that no text can contain. Marks are never shown.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence

_FIRST_MARK, _NUM_MARKS = 0xD800, 0x800  # the surrogates: invalid in UTF-8, so no model or client sends one


def special_token_marks(stops: Sequence[str], special_tokens: re.Pattern[str] | None) -> dict[str, str]:
    """Map the special tokens that `stops` spell to marks. `special_tokens` matches any special token of the
    tokenizer."""
    if special_tokens is None:
        return {}
    found = dict.fromkeys(token for stop in stops for token in special_tokens.findall(stop))
    return {token: chr(_FIRST_MARK + number) for number, token in enumerate(found) if number < _NUM_MARKS}


class StopMatcher:
    def __init__(
        self,
        stops: Sequence[str],
        *,
        marks: Mapping[str, str] | None = None,
        shown: Container[str] = (),
        include_match: bool = False,
    ) -> None:
        """`marks` replace special tokens in the pushed text; those in `shown` appear in the result. `include_match`
        shows the stop string too."""
        assert all(stops), "an empty stop string would match everywhere"
        self._stops = tuple((_marked(stop, marks or {}), stop) for stop in stops)
        self._unmark = {ord(mark): token if token in shown else None for token, mark in (marks or {}).items()}
        self._longest = max((len(pattern) for pattern, _ in self._stops), default=0)
        self._include_match = include_match
        self._pending = ""
        self._num_exempt = 0  # of the pending characters: a stop string that ends in them does not count
        self.matched: str | None = None

    def push(self, text: str, *, armed: bool = True) -> str:
        """Return the text that may be shown now. On a match, return the text before the match; afterwards "".

        With `armed=False`, stop strings that end in this text do not count; a later one may begin in this text."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        text = self._pending + text
        if not armed:
            self._num_exempt = len(text)
        found = self._first(text)
        if found is not None:
            start, self.matched = found
            self._pending = ""
            return self._shown(text[:start]) + (self.matched if self._include_match else "")
        num_decided = len(text) - self._num_withheld(text)
        self._pending = text[num_decided:]
        self._num_exempt = max(0, self._num_exempt - num_decided)
        return self._shown(text[:num_decided])

    def _first(self, text: str) -> tuple[int, str] | None:
        ends = []
        for pattern, stop in self._stops:
            start = text.find(pattern, max(0, self._num_exempt + 1 - len(pattern)))
            if start >= 0:
                ends.append((start + len(pattern), start, stop))
        return min(ends)[1:] if ends else None

    def _num_withheld(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[start:]
            if any(pattern.startswith(tail) for pattern, _ in self._stops):
                return len(tail)
        return 0

    def _shown(self, text: str) -> str:
        return text.translate(self._unmark) if self._unmark else text

    def flush(self) -> str:
        """End the stream and return the withheld text."""
        rest, self._pending = self._pending, ""
        return self._shown(rest)


def _marked(stop: str, marks: Mapping[str, str]) -> str:
    if not marks:
        return stop
    longest_first = sorted(marks, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda found: marks[found[0]], stop)
