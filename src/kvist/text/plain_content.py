"""Keeps the content of chat messages from acting as control tokens (`--special-tokens-in-content text`).

A template writes content and control tokens into one text, where the two can no longer be distinguished. Before
rendering, each special token that is spelled in content is replaced by a mark: a lone surrogate, a character that no
text can contain. The tokenizer then encodes the mark as the plain text of the token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import tokenizers

from kvist.errors import ModelLoadError

_PIECE_CHARS = 1 << 16  # searching a piece takes a few milliseconds, during which no other thread can run
_FIRST_MARK, _NUM_MARKS = 0xD800, 0x7FF  # all surrogates except the last one, which chat.py uses


class PlainContent:
    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, int], any_special: re.Pattern[str] | None
    ) -> None:
        if len(special_tokens) > _NUM_MARKS:
            raise ModelLoadError(
                f"--special-tokens-in-content text supports up to {_NUM_MARKS} special tokens; this tokenizer has "
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
        """Split into texts and marks, alternating; the first and the last part are texts."""
        return self._any_mark.split(text)

    def ids_of(self, mark: str) -> list[int]:
        return self._ids_of.get(mark, [])
