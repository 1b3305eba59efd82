"""PURE. The token ids of continuations, and the fewest rows of an engine that score all of them.

The row of the prompt's last token gives the logprob of every possible next token: continuations of one token need no
row of their own, and are read beside the first token of another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvist.request import TokenLogprobs

_TAIL_TOKENS = 16  # of the prompt: the tokens of a continuation do not depend on earlier ones

Encode = Callable[[str], list[int]]  # without special tokens
TokenIds = tuple[int, ...]


def continuation_token_ids(encode: Encode, tail: str, continuation: str) -> list[int]:
    """Return the token ids of a text that follows the text `tail`, whose own tokens stay as they are.

    They are the ids of both texts together, after those of `tail`. Where the two would share a token, they are those of
    the continuation alone, as at the start of a line."""
    for before in (tail, "\n"):
        alone, both = encode(before), encode(before + continuation)
        if both[: len(alone)] == alone:
            return both[len(alone) :]
    return encode(continuation)


def tail_of(token_ids: Sequence[int]) -> Sequence[int]:
    """Return the last tokens of a prompt, on which the tokens of a continuation may depend."""
    return token_ids[-_TAIL_TOKENS:]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePlan:
    """`rows` are scored from the prompt on, in one engine request each. `beside` are tokens whose logprobs the first
    position of the first row reports, too."""

    rows: tuple[TokenIds, ...]
    beside: tuple[int, ...]

    @staticmethod
    def of(continuations: Sequence[TokenIds]) -> ScorePlan:
        """Plan the rows of continuations, each of at least one token."""
        unique = dict.fromkeys(continuations)
        rows = tuple(each for each in unique if len(each) > 1) or tuple(unique)[:1]
        return ScorePlan(rows=rows, beside=tuple(each[0] for each in unique if len(each) == 1 and each not in rows))

    @staticmethod
    def without_prefix(continuations: Sequence[TokenIds]) -> ScorePlan:
        """Plan the rows for all tokens but the first of each continuation."""
        return ScorePlan(rows=tuple(each for each in dict.fromkeys(continuations) if len(each) > 1), beside=())

    def logprobs(self, continuation: TokenIds, found: Sequence[Sequence[TokenLogprobs]]) -> list[float]:
        """Return the logprob of each token of one of the continuations. `found`: the logprobs of each row's tokens."""
        if continuation in self.rows:
            return [each.logprob for each in found[self.rows.index(continuation)]]
        return [found[0][0].requested_logprobs[self.beside.index(continuation[0])]]
