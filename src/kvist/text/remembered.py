"""Tokenises prompts and remembers the ids of their pieces: the next turn of a long chat costs only its new part.

A long text is cut into pieces of about `PIECE_CHARS` from its start, at places where the tokenizer cuts too
(bounded.py). The cut of a piece depends only on the text up to `WINDOW_CHARS` behind it. A text that begins like an
earlier one therefore has the same pieces, as long as the two texts are equal, and their ids are looked up by this text.
The rest, one piece or a little more, is tokenised as any other text.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass

from kvist.text.bounded import PIECE_CHARS as WHOLE_CHARS
from kvist.text.bounded import WINDOW_CHARS, encode_up_to, place_to_cut, special_end
from kvist.text.tokenizer import Tokenizer

PIECE_CHARS = 4096  # about 1,000 tokens: a lookup takes a hundredth of the time of tokenising them
MAX_TOKENS = 1 << 20  # remembered, with their text: about 16 MB
_MOST_PIECES = 8  # the length of a piece without earlier places to cut; then the rest of the text is not remembered
_HEAD_CHARS = PIECE_CHARS + WINDOW_CHARS

_Head = tuple[str, bool, str]  # text from the start of a piece; whether special tokens are added before it; salt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    examined: str  # the text from the start of the piece that its cut depends on
    num_chars: int
    ids: tuple[int, ...]


class PromptEncoder:
    """Safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._pieces: OrderedDict[_Head, _Piece] = OrderedDict()  # least recently used first
        self._num_tokens = 0
        self._lock = threading.Lock()
        self._special_end = special_end(tokenizer)
        self._shared_ids: dict[int, int] = {}  # one object for each id, in all pieces; bounded by the vocabulary

    @property
    def num_remembered_tokens(self) -> int:
        return self._num_tokens

    def encode_up_to(
        self, text: str, max_tokens: int, *, add_special_tokens: bool = True, salt: str = ""
    ) -> list[int] | None:
        """Return what `bounded.encode_up_to` returns. Pieces are found again with an equal `salt` only: the time that
        they save would show one caller what another has sent."""
        start, ids = 0, list[int]()
        if len(text) <= WHOLE_CHARS:
            max_tokens = sys.maxsize  # short enough to be tokenised in any case
        while len(text) - start > _HEAD_CHARS and len(ids) <= max_tokens:
            piece = self._piece_at(text, start, salt, with_special=add_special_tokens and start == 0)
            if piece is None:
                break
            ids += piece.ids
            start += piece.num_chars
        if start == 0:
            return encode_up_to(self.tokenizer, text, max_tokens, add_special_tokens=add_special_tokens)
        after = self._special_end if add_special_tokens else []
        left = max_tokens - len(ids) - len(after)
        rest = encode_up_to(self.tokenizer, text[start:], left, add_special_tokens=False) if left >= 0 else None
        if rest is None or len(rest) > left:
            return None
        return ids + rest + after

    def _piece_at(self, text: str, start: int, salt: str, *, with_special: bool) -> _Piece | None:
        """Return the piece that begins at `start`, or None if no place to cut is near."""
        head = text[start : start + _HEAD_CHARS], with_special, salt
        with self._lock:
            piece = self._pieces.get(head)
            if piece is not None and text.startswith(piece.examined, start):
                self._pieces.move_to_end(head)
                return piece
        for number in range(1, _MOST_PIECES + 1):
            examined = text[start : start + number * PIECE_CHARS + WINDOW_CHARS]
            if len(examined) < number * PIECE_CHARS + WINDOW_CHARS:
                return None
            end = place_to_cut(self.tokenizer, examined, number * PIECE_CHARS)
            if end is not None:
                break
        else:
            return None
        ids = self.tokenizer.encode(examined[:end], add_special_tokens=with_special)
        if with_special:
            ids = ids[: len(ids) - len(self._special_end)]
        share = self._shared_ids.setdefault
        shared = tuple([share(token_id, token_id) for token_id in ids])
        piece = _Piece(examined=head[0] if number == 1 else examined, num_chars=end, ids=shared)
        self._remember(head, piece)
        return piece

    def _remember(self, head: _Head, piece: _Piece) -> None:
        with self._lock:
            replaced = self._pieces.pop(head, None)
            self._num_tokens += len(piece.ids) - (0 if replaced is None else len(replaced.ids))
            self._pieces[head] = piece
            while self._num_tokens > MAX_TOKENS:
                self._num_tokens -= len(self._pieces.popitem(last=False)[1].ids)
