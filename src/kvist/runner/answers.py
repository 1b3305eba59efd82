"""The answers of the requests whose next token depends on earlier tokens in a way that only the host can follow.

    open:    all tokens so far, replayed ──► a matcher of the constraint; the long bad words
    launch:  the tokens of the items that the host knows are accepted
    read:    the tokens that a step has sampled are accepted ──► forced tokens, which follow in any case
    choice:  the tokens that may follow ──► the bans of the slot (shaping.py)

With steps planned ahead, the token before the one to be chosen may be on the device only. Such a step waits with its
choice, not with its forward pass (cuda_runner.py), until the step before was read.

Only rank 0's compiler has surely compiled the grammar before; the other ranks have begun when the request started at
the latest, and wait for it here. All ranks use the same grammars and the same tokens, so they ban the same tokens.

A constraint that cannot be followed (its mask would take more work than the limits allow) fails its request alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvist.errors import InvalidConstraint, KvistError
from kvist.grammar.backend import Matcher, Words
from kvist.grammar.compiler import GrammarCompiler
from kvist.plan.batch import BatchItem, StartRequest
from kvist.request import SamplingParams, SlotId, needs_known_token

_COMPILE_WAIT_S = 30.0  # as good as never: rank 0 has compiled the grammar, or it was dropped while the request waited
_MAX_FORCED = 64  # tokens that follow one sampled token; the next step goes on
_NO_COMPILER = "this worker cannot compile constraints: its checkpoint has no tokenizer"
_FORBIDDEN = "the answer so far does not satisfy the constraint: another version of Kvist may have written it"
_MISSING = "the step before has failed"


class Answer:
    """One request, from the start of its slot. Mutable; owned by the runner's thread. A step in flight keeps its own
    reference: the slot may get another request meanwhile."""

    def __init__(self, start: StartRequest, num_words: int) -> None:
        params = start.sampling
        self.token_ids = list(start.token_ids)  # the known tokens of prompt and output; the matcher has them
        self.has_constraint = params.constraint is not None
        self.words = tuple(word for word in params.bad_words if len(word) > 1)
        self.matcher: Matcher | None = None  # None without a constraint, and after an error
        self.error = ""
        self.mask: Words | None = None  # the tokens that may follow `token_ids`; None: not computed yet
        self._num_words = num_words
        self._skips_forced = _skips_forced(params)

    def fail(self, message: str) -> None:
        self.matcher, self.mask, self.error = None, None, self.error or message

    def accept(self, position: int, token_ids: Sequence[int]) -> None:
        """Take the tokens at `position` and after it, of which the first ones may be known already."""
        if position > len(self.token_ids):
            self.fail(_MISSING)
            return
        new = token_ids[len(self.token_ids) - position :]
        if not new:
            return
        self.token_ids += new
        self.mask = None
        if self.matcher is not None:
            try:
                if not self.matcher.accept(new):
                    raise InvalidConstraint(_FORBIDDEN)
            except KvistError as error:
                self.fail(error.message)

    def completing(self) -> set[int]:
        """Return the tokens that would complete one of `words`."""
        return {word[-1] for word in self.words if tuple(self.token_ids[1 - len(word) :]) == word[:-1]}

    def bans_at(self, position: int) -> npt.NDArray[np.uint32]:
        """Return the bits of the tokens that the constraint excludes at `position`, [num_words]; its tokens before are
        known, and `mask` is. All bits are set if the constraint cannot be followed."""
        if position == len(self.token_ids) and self.mask is not None:
            return ~self.mask.view(np.uint32)
        bits = np.full(self._num_words, 0xFFFFFFFF, dtype=np.uint32)
        if position < len(self.token_ids):  # a forced token, computed again by a step that was in flight
            token_id = self.token_ids[position]
            bits[token_id >> 5] ^= np.uint32(1 << (token_id & 31))
        elif not self.error:
            self.fail(_MISSING)
        return bits

    @property
    def may_skip(self) -> bool:
        """Whether tokens may follow without a step of their own."""
        return self._skips_forced and self.matcher is not None and not self.matcher.is_terminated

    def accept_forced(self) -> bool:
        """Accept the token that follows in any case, if there is one; `mask` is known. A step would sample the same
        token, because nothing else is allowed."""
        token_id = _only_token(self.mask) if self.may_skip and self.mask is not None else None
        if token_id is None:
            return False
        self.accept(len(self.token_ids), (token_id,))
        return True


@dataclass(frozen=True, slots=True)
class FollowedRow:
    """A row of a step that samples the token at `position` of an answer."""

    row: int
    position: int
    answer: Answer


FollowedRows = Sequence[FollowedRow]


class SlotAnswers:
    """A `SlotState`. Mutable; owned by `SlotShaping`."""

    def __init__(self, vocab_size: int, grammars: GrammarCompiler | None) -> None:
        self._num_words = -(-vocab_size // 32)
        self._grammars = grammars
        self._answers: dict[SlotId, Answer] = {}

    def open(self, start: StartRequest) -> None:
        if not needs_known_token(start.sampling):
            return
        answer = self._answers[start.slot] = Answer(start, self._num_words)
        constraint = start.sampling.constraint
        if constraint is None:
            return
        if self._grammars is None:
            answer.fail(_NO_COMPILER)
            return
        try:
            matcher = self._grammars.start(constraint).result(_COMPILE_WAIT_S).matcher()
            if not matcher.accept(start.token_ids[start.num_prompt_tokens :]):
                raise InvalidConstraint(_FORBIDDEN)
            answer.matcher = matcher
        except KvistError as error:
            answer.fail(error.message)

    def close(self, slot: SlotId) -> None:
        self._answers.pop(slot, None)

    def get(self, slot: SlotId) -> Answer | None:
        return self._answers.get(slot)

    def accept_known(self, items: Iterable[BatchItem]) -> None:
        """Accept the tokens of the items. Needs the items of every step, in order: several new tokens may be computed
        in several steps, of which only the last one samples."""
        if self._answers:
            for item in items:
                answer = self._answers.get(item.slot)
                if answer is not None and item.token_ids:
                    answer.accept(item.start, item.token_ids)

    def await_tokens(self, items: Iterable[BatchItem]) -> bool:
        """Return whether a token is to be chosen after a token that the host does not know."""
        if not self._answers:
            return False
        found = ((item, self._answers.get(item.slot)) for item in items if item.samples)
        return any(answer is not None and item.end > len(answer.token_ids) for item, answer in found)

    def followed(self, items: Iterable[BatchItem]) -> FollowedRows:
        """Return the rows of the items that these answers follow."""
        if not self._answers:
            return ()
        sampled = enumerate(item for item in items if item.samples)
        found = ((row, item, self._answers.get(item.slot)) for row, item in sampled)
        return [FollowedRow(row, item.end, answer) for row, item, answer in found if answer is not None]

    def fill(self, rows: FollowedRows) -> None:
        """Compute the masks of the answers that lack them, in parallel."""
        found = [each.answer for each in rows if each.answer.matcher is not None and each.answer.mask is None]
        if not found:
            return
        assert self._grammars is not None
        masks = np.empty((len(found), self._num_words), dtype=np.int32)
        errors = self._grammars.fill([answer.matcher for answer in found if answer.matcher is not None], masks)
        for place, answer in enumerate(found):
            answer.mask = masks[place]
            if place in errors:
                answer.fail(errors[place].message)

    def read(self, rows: FollowedRows, token_ids: Sequence[int]) -> None:
        """Accept the tokens [num_rows] that a step has sampled. A row without a token is left out: it fails."""
        for each in rows:
            if token_ids[each.row] >= 0:
                each.answer.accept(each.position, token_ids[each.row : each.row + 1])

    def take_forced(self, rows: FollowedRows) -> dict[int, list[int]]:
        """Return the tokens that follow the tokens of the rows in any case, by row, after `read`. Tokens that a later
        step has computed are not returned again."""
        if not rows:
            return {}
        newest = [each for each in rows if each.answer.may_skip and len(each.answer.token_ids) == each.position + 1]
        left = newest
        for _ in range(_MAX_FORCED):
            if not left:
                break
            self.fill(left)
            left = [each for each in left if each.answer.accept_forced()]
        found = ((each.row, each.answer.token_ids[each.position + 1 :]) for each in newest)
        return {row: token_ids for row, token_ids in found if token_ids}


def errors_of(rows: FollowedRows) -> Mapping[int, str]:
    """Return why constraints cannot be followed, by row. Nearly always empty."""
    return {each.row: each.answer.error for each in rows if each.answer.error}


def _skips_forced(params: SamplingParams) -> bool:
    """Return whether tokens need no step of their own if nothing else may follow. Logprobs need the model's output for
    each token, penalties are counted by the steps, and other bans may exclude a forced token."""
    return (
        params.constraint is not None
        and params.num_logprobs is None
        and not params.has_penalties
        and not params.bad_words
        and not params.allowed_token_ids
    )


def _only_token(mask: Words) -> int | None:
    """Return the token whose bit alone is set."""
    places = np.flatnonzero(mask)
    if len(places) != 1:
        return None
    word = int(mask.view(np.uint32)[places[0]])
    return None if word & (word - 1) else int(places[0]) * 32 + word.bit_length() - 1
