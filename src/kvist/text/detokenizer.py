"""Converts a stream of tokens to text. One instance per stream; its owner pushes every token once, in order.

The detokenizer never splits a character: the bytes of an incomplete character wait until the next token or `flush`. The
joined output equals `Tokenizer.decode` of all tokens, however the tokens were split into pushes. Cost: O(bytes pushed).
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence

from kvist.text.tokenizer import Tokenizer

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, marks: Mapping[int, str] | None = None
    ) -> None:
        """`marks` maps ids of skipped tokens to their marks in the text (stops.py); other skipped tokens leave no
        trace."""
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._marks = marks or {}
        self._decode = _utf8_decoder("replace").decode

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the characters that these tokens complete."""
        skipped, token_bytes = self._skipped, self._token_bytes
        if len(token_ids) == 1:
            token_id = token_ids[0]
            return self._marks.get(token_id, "") if token_id in skipped else self._decode(token_bytes(token_id))
        if self._marks:
            return "".join([self.push((token_id,)) for token_id in token_ids])
        return self._decode(b"".join([token_bytes(token_id) for token_id in token_ids if token_id not in skipped]))

    def flush(self) -> str:
        """End the stream. Return U+FFFD for an incomplete character, else ""."""
        return self._decode(b"", True)
