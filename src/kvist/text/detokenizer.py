"""Text from tokens as they come. One instance for each stream; its owner feeds it every token once, in order.

It never splits a character: bytes that may still become one wait inside until the next token or `flush`. The joined
output equals `Tokenizer.decode` of all the tokens, however they were cut into pushes. Cost is O(bytes pushed).
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
        """`marks`: what a skipped token leaves in the text, by its id (stops.py); others leave nothing."""
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._marks = marks or {}
        self._decode = _utf8_decoder("replace").decode

    def push(self, token_ids: Sequence[int]) -> str:
        """The characters that these tokens complete."""
        skipped, token_bytes = self._skipped, self._token_bytes
        if len(token_ids) == 1:
            token_id = token_ids[0]
            return self._marks.get(token_id, "") if token_id in skipped else self._decode(token_bytes(token_id))
        if self._marks:
            return "".join([self.push((token_id,)) for token_id in token_ids])
        return self._decode(b"".join([token_bytes(token_id) for token_id in token_ids if token_id not in skipped]))

    def flush(self) -> str:
        """At the end of the stream: what still waited, as U+FFFD, or nothing."""
        return self._decode(b"", True)
