"""The matchers of the constrained requests in slots: which tokens may come next.

    open:  the grammar, compiled before the request was queued ──► a matcher, to which all output tokens are replayed
    step:  the newest tokens are accepted, and the allowed tokens become bans of the slot (shaping.py)

Only rank 0's compiler has surely compiled the grammar before; the other ranks have begun when the request started at
the latest, and wait for it here. All ranks use the same grammars and the same tokens, so they ban the same tokens.

A constraint that cannot be followed (its mask would take more work than the limits allow) fails its request alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvist.errors import InvalidConstraint, KvistError
from kvist.grammar.backend import Matcher, Words
from kvist.grammar.compiler import GrammarCompiler
from kvist.plan.batch import BatchItem, StartRequest
from kvist.request import SlotId

_COMPILE_WAIT_S = 30.0  # as good as never: rank 0 has compiled the grammar, or it was dropped while the request waited
_NO_COMPILER = "this worker cannot compile constraints: its checkpoint has no tokenizer"
_FORBIDDEN = "the answer so far does not satisfy the constraint: another version of Kvist may have written it"


@dataclass(slots=True, kw_only=True)
class _Answer:
    """One answer. Owned by `SlotMatchers`."""

    num_tokens: int  # of prompt and answer; those of the answer are accepted
    matcher: Matcher | None = None  # None: see `error`
    error: str = ""


class SlotMatchers:
    """A `SlotState`. Mutable; owned by the slot table of one rank."""

    def __init__(self, vocab_size: int, grammars: GrammarCompiler | None) -> None:
        self._num_words = -(-vocab_size // 32)
        self._grammars = grammars
        self._answers: dict[SlotId, _Answer] = {}

    def open(self, start: StartRequest) -> None:
        constraint = start.sampling.constraint
        if constraint is None:
            return
        answer = self._answers[start.slot] = _Answer(num_tokens=len(start.token_ids))
        if self._grammars is None:
            answer.error = _NO_COMPILER
            return
        try:
            matcher = self._grammars.start(constraint).result(_COMPILE_WAIT_S).matcher()
            if matcher.accept(start.token_ids[start.num_prompt_tokens :]):
                answer.matcher = matcher
            else:
                answer.error = _FORBIDDEN
        except KvistError as error:
            answer.error = error.message

    def close(self, slot: SlotId) -> None:
        self._answers.pop(slot, None)

    def advance(self, item: BatchItem) -> None:
        """Accept the tokens of the item that are new. Needs every item of a slot with a constraint, in order: several
        new tokens may be computed in several steps, of which only the last one samples."""
        answer = self._answers[item.slot]
        if answer.matcher is None or item.end <= answer.num_tokens:
            return
        assert item.token_ids, "the row of a request whose last token must be known has that token"
        assert item.start <= answer.num_tokens, "a token is missing"
        try:
            if not answer.matcher.accept(item.token_ids[answer.num_tokens - item.start :]):
                raise InvalidConstraint(_FORBIDDEN)
        except KvistError as error:
            answer.matcher, answer.error = None, error.message
        answer.num_tokens = item.end

    def allowed(self, slot: SlotId) -> Words:
        """Return the mask of the next token of a slot with a constraint, [ceil(vocab_size / 32)]; no bit is set if the
        constraint cannot be followed."""
        answer = self._answers[slot]
        mask = np.zeros(self._num_words, dtype=np.int32)
        if answer.matcher is not None:
            try:
                answer.matcher.fill(mask)
            except KvistError as error:
                answer.matcher, answer.error = None, error.message
                mask[:] = 0
        return mask

    def errors(self, slots: list[SlotId]) -> dict[int, str]:
        """Return why constraints cannot be followed, by place in `slots`. Nearly always empty."""
        if not self._answers:
            return {}
        found = [(place, self._answers.get(slot)) for place, slot in enumerate(slots)]
        return {place: answer.error for place, answer in found if answer is not None and answer.error}
