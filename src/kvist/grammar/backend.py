"""The interface of grammar backends.

    Constraint ──compile──► Grammar ──matcher──► Matcher: accept, fill, accept, fill, …

A matcher follows one answer. Its state is a function of the grammar and of the answer's tokens so far: wherever the
answer is continued, a new matcher is made, and the tokens are replayed to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvist.errors import InvalidConstraint
from kvist.request import Constraint

FORBIDDEN = "the answer so far does not satisfy the constraint: another version of Kvist may have written it"
Words = npt.NDArray[np.int32]  # packed bits, one for each token, the lowest bit of a word first


class TokenTable(Protocol):
    """The part of `text.Tokenizer` that a backend reads."""

    vocab_size: int
    special_token_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The tokens of the served model."""

    tokens: TokenTable
    size: int  # of the model's output, perhaps padded beyond the tokenizer's
    end_token_ids: tuple[int, ...]  # allowed where an answer may end, and only there

    @property
    def num_words(self) -> int:
        """The length of a mask."""
        return -(-self.size // 32)

    def token_bytes(self) -> list[bytes]:
        """Return the bytes of every token; empty for padding."""
        known = min(self.size, self.tokens.vocab_size)
        return [self.tokens.token_bytes(token_id) for token_id in range(known)] + [b""] * (self.size - known)

    def special_token_ids(self) -> list[int]:
        """Return the tokens that stand for no text."""
        return sorted({*self.end_token_ids, *(each for each in self.tokens.special_token_ids if each < self.size)})


class Matcher(Protocol):
    """The state of one answer. Mutable; has one owner."""

    @property
    def is_terminated(self) -> bool:
        """Whether the answer is complete: only an end token may follow."""

    def accept(self, token_ids: Sequence[int]) -> bool:
        """Append tokens to the answer. Return False at the first token that the grammar forbids; the matcher cannot be
        used any more then. Raises `InvalidConstraint` if this would take more work than the limits allow."""

    def fill(self, allowed: Words) -> None:
        """Set the bit of every token that may follow in `allowed` [num_words], and clear all others. Raises
        `InvalidConstraint` if this would take more work than the limits allow."""

    def forced(self) -> Sequence[int]:
        """Return tokens of which each is the only one that may follow those before it, found with less work than by
        masks. Masks may show more of them."""


class Grammar(Protocol):
    """A compiled constraint. Immutable; shared by all answers with this constraint."""

    ignored: tuple[str, ...]  # parts of the constraint without effect, to be read by people; empty if it is strict

    def matcher(self) -> Matcher:
        """Return the matcher of an empty answer."""


class GrammarBackend(Protocol):
    """Safe to use from several threads."""

    vocabulary: Vocabulary

    def compile(self, constraint: Constraint) -> Grammar:
        """Raises `InvalidConstraint`, whose `param` is the path of the faulty part inside a schema, if it is known.
        Takes a bounded time, and releases the interpreter lock for nearly all of it."""

    def accept(self, matchers: Sequence[Matcher], token_ids: Sequence[int]) -> dict[int, InvalidConstraint]:
        """Append one token to each answer, in parallel. Each matcher occurs once, and is of a grammar of this backend.
        Return why not, by place; such a matcher cannot be used any more."""

    def fill(self, matchers: Sequence[Matcher], allowed: Words) -> dict[int, InvalidConstraint]:
        """Fill `allowed` [num_matchers, num_words] as `Matcher.fill` does, in parallel. Each matcher occurs once, and
        is of a grammar of this backend. Return the errors, by place; such a matcher cannot be used any more."""


def accept_one(matcher: Matcher, token_ids: Sequence[int]) -> InvalidConstraint | None:
    """Append tokens to the answer. Return why not."""
    try:
        return None if matcher.accept(token_ids) else InvalidConstraint(FORBIDDEN)
    except InvalidConstraint as error:
        return error.with_traceback(None)


def accept_one_by_one(matchers: Sequence[Matcher], token_ids: Sequence[int]) -> dict[int, InvalidConstraint]:
    """`GrammarBackend.accept`, without threads."""
    found = enumerate(zip(matchers, token_ids, strict=True))
    errors = ((place, accept_one(matcher, (token_id,))) for place, (matcher, token_id) in found)
    return {place: error for place, error in errors if error is not None}


def fill_one_by_one(matchers: Sequence[Matcher], allowed: Words) -> dict[int, InvalidConstraint]:
    """`GrammarBackend.fill`, without threads."""
    errors: dict[int, InvalidConstraint] = {}
    for place, matcher in enumerate(matchers):
        try:
            matcher.fill(allowed[place])
        except InvalidConstraint as error:
            errors[place] = error.with_traceback(None)
    return errors
