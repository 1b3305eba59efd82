"""Tokenises a text in pieces up to a limit of tokens, so that time and memory do not grow with the excess of the text.

A tokenizer takes about 100 bytes of memory for each character of one input. A long text is therefore cut before words,
where the pre-tokenizers of byte-level models cut too: the joined ids of the pieces are the ids of the whole text. A
text without such cut points (no spaces, or a tokenizer that merges across words) is first counted in pieces, and
tokenised as a whole only if it fits by that count.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

from kvist.text.tokenizer import Alphabet, Tokenizer

PIECE_CHARS = 32768
_SEARCHED_CHARS = 1024  # searched backwards for a cut point
WINDOW_CHARS = 48  # tokenised on both sides of a candidate, to verify the cut point
_MAX_TRIES = 8
_CUT_ERROR_TOKENS = 64  # bound of the change of the count by a cut inside a word


def encode_up_to(
    tokenizer: Tokenizer, text: str, max_tokens: int, *, add_special_tokens: bool = True
) -> list[int] | None:
    """Return the ids as `Tokenizer.encode` does, or None when a text of more than one piece has over `max_tokens`."""
    if len(text) <= PIECE_CHARS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    after = special_end(tokenizer) if add_special_tokens else []
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
    """Yield start and text of each piece, and whether the piece ends where the tokenizer cuts too."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        place = place_to_cut(tokenizer, text, start + PIECE_CHARS)
        end = start + PIECE_CHARS if place is None else place
        yield start, text[start:end], place is not None
        start = end
    yield start, text[start:], True


def place_to_cut(tokenizer: Tokenizer, text: str, end: int) -> int | None:
    """Return the last index up to `end` where a word begins after one space, else one where a special token begins, or
    None when neither is near. Reads the text up to `end + WINDOW_CHARS`."""
    if tokenizer.alphabet is not Alphabet.BYTE_LEVEL:
        return None
    words = (
        place
        for place in range(end, end - _SEARCHED_CHARS, -1)
        if text[place] == " " and text[place - 1].isalpha() and text[place + 1 : place + 2].isalpha()
    )
    places = chain(islice(words, _MAX_TRIES), islice(_special_starts(tokenizer, text, end), _MAX_TRIES))
    return next((place for place in places if _cuts_at(tokenizer, text, place)), None)


def _special_starts(tokenizer: Tokenizer, text: str, end: int) -> Iterator[int]:
    """Yield the indices near `end` where special tokens begin, the last one first."""
    pattern = tokenizer.special_token_pattern
    if pattern is not None:
        found = pattern.finditer(text, max(1, end - _SEARCHED_CHARS), end + WINDOW_CHARS)
        yield from reversed([match.start() for match in found if match.start() <= end])


def _cuts_at(tokenizer: Tokenizer, text: str, place: int) -> bool:
    """Return whether the windows on both sides of `place` have the same ids separately and together."""
    left, right = text[place - WINDOW_CHARS : place], text[place : place + WINDOW_CHARS]
    both, one, other = (tokenizer.encode(part, add_special_tokens=False) for part in (left + right, left, right))
    return both == one + other


def special_end(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the tokenizer adds after a text; most tokenizers add none."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    with_special = tokenizer.encode("a", add_special_tokens=True)
    return with_special[with_special.index(bare[-1]) + 1 :]
