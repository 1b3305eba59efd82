"""Keeps what a chat message says from working as a control token (`--special-tokens-in-content text`).

A template writes content and control tokens into one text, in which they cannot be told apart. So each special token
that is spelled in content goes through the template as one character that no text can hold, a lone surrogate; the
tokenizer then takes that character for the plain text of the token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import tokenizers

from kvist.errors import ModelLoadError

_PIECE_CHARS = 1 << 16  # searched in a few milliseconds, for which no other thread can run
_FIRST_MARK, _NUM_MARKS = 0xD800, 0x7FF  # all surrogates but the last, which is chat.py's


class PlainContent:
    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, int], any_special: re.Pattern[str] | None
    ) -> None:
        if len(special_tokens) > _NUM_MARKS:
            raise ModelLoadError(
                f"--special-tokens-in-content text works for up to {_NUM_MARKS} special tokens; this tokenizer has "
                f"{len(special_tokens)}"
            )
        self._any_special = any_special
        self._longest = max(map(len, special_tokens), default=0)
        self._mark_of = {token: chr(_FIRST_MARK + number) for number, token in enumerate(sorted(special_tokens))}
        plain = tokenizers.Tokenizer.from_str(backend.to_str())
        plain.encode_special_tokens = True
        self._ids_of: dict[str, list[int]] = {
            mark: plain.encode(token, add_special_tokens=False).ids for token, mark in self._mark_of.items()
        }
        self._any_mark = re.compile("([\ud800-\udffe])")

    def protect(self, content: str) -> str:
        if self._any_special is None:
            return content
        pieces: list[str] = []
        place = 0
        while place < len(content):
            end = place + _PIECE_CHARS
            found = self._any_special.search(content, place, end + self._longest)
            if found is None or found.start() >= end:
                pieces.append(content[place:end])
                place = end
            else:
                pieces += content[place : found.start()], self._mark_of[found[0]]
                place = found.end()
        return "".join(pieces)

    def split(self, text: str) -> list[str]:
        """Texts and marks in turn; first and last a text."""
        return self._any_mark.split(text)

    def ids_of(self, mark: str) -> list[int]:
        return self._ids_of.get(mark, [])
