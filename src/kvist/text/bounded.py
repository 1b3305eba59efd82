"""Tokenises a text as far as it could fit, piece by piece: neither time nor memory grow with what is too long anyway.

A tokenizer needs about 100 bytes of memory for each character of what it is given at once. So a long text is cut before
words, where the pre-tokenizers of byte-level models cut it too: the ids of the pieces are the ids of the whole. A text
without such places (no spaces, or a tokenizer that merges across words) is counted in pieces first, and tokenised as
one only when that says that it fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from kvist.text.tokenizer import Alphabet, Tokenizer

PIECE_CHARS = 32768
_SEARCHED_CHARS = 1024  # how far back a place to cut is looked for
_WINDOW_CHARS = 48  # what is tokenised on both sides of a place, to see that it is one
_MAX_TRIES = 8
_CUT_ERROR_TOKENS = 64  # by which a cut inside a word may change the count


def encode_up_to(
    tokenizer: Tokenizer, text: str, max_tokens: int, *, add_special_tokens: bool = True
) -> list[int] | None:
    """As `Tokenizer.encode`; None when there are more than `max_tokens`. A text of one piece is never None."""
    if len(text) <= PIECE_CHARS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    after = _special_end(tokenizer) if add_special_tokens else []
    ids: list[int] = []
    num_bad_cuts = 0
    for start, piece, is_good in _pieces(tokenizer, text):
        found = tokenizer.encode(piece, add_special_tokens=add_special_tokens and start == 0)
        ids += found[: len(found) - len(after)] if start == 0 else found
        num_bad_cuts += not is_good
        if len(ids) + len(after) - num_bad_cuts * _CUT_ERROR_TOKENS > max_tokens:
            return None
    if not num_bad_cuts:
        return ids + after
    whole = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return whole if len(whole) <= max_tokens else None


def _pieces(tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, str, bool]]:
    """The pieces with their starts, and whether each one's end is a place where the tokenizer cuts too."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        place = _place_to_cut(tokenizer, text, start + PIECE_CHARS)
        end = start + PIECE_CHARS if place is None else place
        yield start, text[start:end], place is not None
        start = end
    yield start, text[start:], True


def _place_to_cut(tokenizer: Tokenizer, text: str, end: int) -> int | None:
    """The last place before `end` where a word begins after one space; None: there is none near."""
    if tokenizer.alphabet is not Alphabet.BYTE_LEVEL:
        return None
    words = (
        place
        for place in range(end, end - _SEARCHED_CHARS, -1)
        if text[place] == " " and text[place - 1].isalpha() and text[place + 1 : place + 2].isalpha()
    )
    return next((place for place in islice(words, _MAX_TRIES) if _cuts_at(tokenizer, text, place)), None)


def _cuts_at(tokenizer: Tokenizer, text: str, place: int) -> bool:
    """As far as can be seen from near by: what stands to the left and to the right is tokenised alike together."""
    left, right = text[place - _WINDOW_CHARS : place], text[place : place + _WINDOW_CHARS]
    both, one, other = (tokenizer.encode(part, add_special_tokens=False) for part in (left + right, left, right))
    return both == one + other


def _special_end(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer adds after a text; most add nothing there."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    dressed = tokenizer.encode("a", add_special_tokens=True)
    return dressed[dressed.index(bare[-1]) + 1 :]
