"""The answers of the requests whose next token depends on earlier tokens in a way that only the host can follow.

    open:    all tokens so far, replayed ──► a matcher of the constraint; the long bad words
    launch:  the tokens of the items that the host knows are accepted
    read:    the tokens that a step has sampled are accepted together ──► forced tokens, which follow in any case
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
from kvist.grammar.backend import FORBIDDEN, Matcher, Words, accept_one
from kvist.grammar.compiler import GrammarCompiler
from kvist.plan.batch import BatchItem, StartRequest
from kvist.request import SamplingParams, SlotId, needs_known_token

_COMPILE_WAIT_S = 30.0  # as good as never: rank 0 has compiled the grammar, or it was dropped while the request waited
_MAX_FORCED = 64  # tokens that follow one sampled token; the next step goes on
_NO_COMPILER = "this worker cannot compile constraints: its checkpoint has no tokenizer"
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
        self.forced: int | None = None  # the only token of `mask`, if it has only one
        self._num_words = num_words
        self._max_len = start.num_prompt_tokens + params.max_tokens
        self._skips_forced = _skips_forced(params)

    def fail(self, message: str) -> None:
        self.matcher, self.mask, self.forced, self.error = None, None, None, self.error or message

    def accept(self, position: int, token_ids: Sequence[int]) -> None:
        """Take the tokens at `position` and after it, of which the first ones may be known already."""
        if position > len(self.token_ids):
            self.fail(_MISSING)
            return
        new = token_ids[len(self.token_ids) - position :]
        if not new:
            return
        matcher = self.append(new)
        error = None if matcher is None else accept_one(matcher, new)
        if error is not None:
            self.fail(error.message)

    def append(self, token_ids: Sequence[int]) -> Matcher | None:
        """Append tokens. Return the matcher that has to accept them."""
        self.token_ids += token_ids
        self.mask, self.forced = None, None
        return self.matcher

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

    def take_forced(self, max_tokens: int) -> None:
        """Append tokens that follow in any case, at most `max_tokens` of them, if `mask` is known and has one token."""
        if self.matcher is None or self.forced is None:
            return
        run = self.matcher.forced()
        if not run or run[0] != self.forced:
            run = (self.forced,)
        self.accept(len(self.token_ids), run[: min(max_tokens, self._max_len - len(self.token_ids))])

    @property
    def may_skip(self) -> bool:
        """Whether tokens may follow without a step of their own."""
        may_grow = len(self.token_ids) < self._max_len
        return self._skips_forced and may_grow and self.matcher is not None and not self.matcher.is_terminated


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
                raise InvalidConstraint(FORBIDDEN)
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
        for answer, mask, only in zip(found, masks, _only_tokens(masks), strict=True):
            answer.mask, answer.forced = mask, only
        for place, error in errors.items():
            found[place].fail(error.message)

    def read(self, rows: FollowedRows, token_ids: Sequence[int]) -> None:
        """Accept the tokens [num_rows] that a step has sampled. A row without a token is left out: it fails."""
        sampled = [each for each in rows if token_ids[each.row] >= 0]
        is_next = [each.position == len(each.answer.token_ids) for each in sampled]
        for each, is_new in zip(sampled, is_next, strict=True):
            if not is_new:  # known already: a forced token, computed again by a step that was in flight
                each.answer.accept(each.position, (token_ids[each.row],))
        new = [each for each, is_new in zip(sampled, is_next, strict=True) if is_new]
        self._accept([each.answer for each in new], [token_ids[each.row] for each in new])

    def take_forced(self, rows: FollowedRows) -> dict[int, list[int]]:
        """Return the tokens that follow the tokens of the rows in any case, by row, after `read`. A step would sample
        the same tokens, because nothing else is allowed. Tokens that a later step has computed are not returned again.
        """
        if not rows:
            return {}
        newest = [each for each in rows if each.answer.may_skip and len(each.answer.token_ids) == each.position + 1]
        left = newest
        while left:
            self.fill(left)
            for each in left:
                each.answer.take_forced(_MAX_FORCED + each.position + 1 - len(each.answer.token_ids))
            left = [each for each in left if each.answer.mask is None and each.answer.may_skip]
        found = ((each.row, each.answer.token_ids[each.position + 1 :]) for each in newest)
        return {row: token_ids for row, token_ids in found if token_ids}

    def _accept(self, answers: Sequence[Answer], token_ids: Sequence[int]) -> None:
        """Append one token to each answer."""
        appended = [(answer, answer.append((each,)), each) for answer, each in zip(answers, token_ids, strict=True)]
        found = [(answer, matcher, token_id) for answer, matcher, token_id in appended if matcher is not None]
        if not found:
            return
        assert self._grammars is not None
        errors = self._grammars.accept([matcher for _, matcher, _ in found], [token_id for *_, token_id in found])
        for place, error in errors.items():
            found[place][0].fail(error.message)


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


def _only_tokens(masks: Words) -> list[int | None]:
    """Return the token whose bit alone is set in each mask [num_masks, num_words], where there is one."""
    words = masks.view(np.uint32)
    only: list[int | None] = [None] * len(masks)
    # If one word alone is not 0, it is the largest and the sum. Sums that overflow may be equal, too.
    largest, sums = words.max(axis=1), words.sum(axis=1, dtype=np.uint32)
    for place in np.flatnonzero((largest == sums) & (largest & (largest - 1) == 0)).tolist():
        if np.count_nonzero(words[place]) == 1:  # is not zero
            only[place] = int(words[place].argmax()) * 32 + int(largest[place]).bit_length() - 1
    return only
