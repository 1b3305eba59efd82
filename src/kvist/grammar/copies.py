"""Grammars and matchers of llguidance, whose work is done on several threads.

All matchers of one compiled grammar share its lexer, under a lock of the library: their masks are computed one after
the other, on however many threads. A grammar with many answers is therefore compiled again, and its answers are spread
over these copies:

    matcher() ──► the copy with the fewest answers
                      └─ has several ─► a thread compiles one more copy, for later answers; at most one for each core

The lexer keeps its states, and their number is limited. Answers that have failed at the limit because of the states of
earlier answers are replayed in a new copy. A constraint that exceeds a limit by itself still fails
(docs/adr/0036-copies-of-a-grammar.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from weakref import WeakSet

import llguidance

from kvist.errors import InvalidConstraint
from kvist.grammar.backend import Words

_ANSWERS_OF_A_COPY = 4  # at a time; with more, another copy is worth its compilation
_MAX_COMPILE_S = 0.02  # as long as a mask may take; a copy that takes longer is never compiled while answers wait


class _Copy:
    """One compilation of a grammar. Mutable; owned by its grammar."""

    def __init__(self, start: llguidance.LLMatcher) -> None:
        self.start = start
        self.answers: WeakSet[LlguidanceMatcher] = WeakSet()  # present ones
        self.num_answers = 0  # since the compilation


class LlguidanceGrammar:
    """A `Grammar`. `matcher` is called by one thread; another one may add a copy meanwhile."""

    def __init__(
        self,
        start: llguidance.LLMatcher,
        compile_again: Callable[[], llguidance.LLMatcher],
        *,
        compile_s: float,
        end_token_ids: Sequence[int],
        max_copies: int,
        readable: Callable[[str], str],
    ) -> None:
        """`compile_s`: how long the compilation took. `readable` shortens a message of the library."""
        self.ignored = tuple(readable(each) for each in start.get_grammar_warnings())
        self.readable = readable
        self.end_token_ids = frozenset(end_token_ids)
        self._compile_again = compile_again
        self._compile_s = compile_s
        self._max_copies = max_copies
        self._copies = [_Copy(start)]
        self._compiling = threading.Lock()  # held while a thread compiles a copy
        self._adding = threading.Lock()

    @property
    def num_copies(self) -> int:
        return len(self._copies)

    def matcher(self) -> LlguidanceMatcher:
        copy = self._least_used()
        if len(copy.answers) >= _ANSWERS_OF_A_COPY and len(self._copies) < self._max_copies:
            self._compile_later(None)
        return LlguidanceMatcher(self, copy)

    def replacement(self, spent: _Copy) -> _Copy | None:
        """Return a copy for an answer for which `spent` has no states left; None if compiling one takes too long."""
        if spent in self._copies:
            if self._compile_s > _MAX_COMPILE_S:
                self._compile_later(spent)
                return None
            return self._add(self._compile_again(), spent)
        return self._least_used()

    def _least_used(self) -> _Copy:
        return min(self._copies, key=lambda copy: len(copy.answers))

    def _compile_later(self, spent: _Copy | None) -> None:
        if self._compiling.acquire(blocking=False):
            name = "kvist-grammar-copy"
            threading.Thread(target=self._compile_on_thread, args=(spent,), name=name, daemon=True).start()

    def _compile_on_thread(self, spent: _Copy | None) -> None:
        try:
            self._add(self._compile_again(), spent)
        finally:
            self._compiling.release()

    def _add(self, start: llguidance.LLMatcher, spent: _Copy | None) -> _Copy:
        assert not start.is_error(), "the same text was compiled before"
        added = _Copy(start)
        with self._adding:
            self._copies = [added, *(copy for copy in self._copies if copy is not spent)]
        return added


class LlguidanceMatcher:
    """A `Matcher`."""

    def __init__(self, grammar: LlguidanceGrammar, copy: _Copy) -> None:
        self._grammar = grammar
        self._token_ids: list[int] = []
        self._enter(copy)

    @property
    def is_terminated(self) -> bool:
        return self.library_matcher.is_stopped()

    def accept(self, token_ids: Sequence[int]) -> bool:
        left = self._consume(token_ids)
        while left and not self._is_over and self._enter_another_copy():
            left = self._consume(left)
        self._raise_if_failed()
        # The library's matcher takes nothing after the end of an answer; here, end tokens may follow.
        return not left or (self._is_over and self._grammar.end_token_ids.issuperset(left))

    @property
    def _is_over(self) -> bool:
        return self.library_matcher.is_stopped() and not self.library_matcher.is_error()

    def _consume(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Append tokens; return those from the first refused one on. At the limit of states, the library refuses a
        token without an error."""
        num_accepted = self.library_matcher.try_consume_tokens(list(token_ids))
        self._token_ids += token_ids[:num_accepted]
        return token_ids[num_accepted:]

    def fill(self, allowed: Words) -> None:
        self.library_matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)
        while self.library_matcher.is_error() and self._enter_another_copy():
            self.library_matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)
        self._raise_if_failed()

    def forced(self) -> Sequence[int]:
        """Masks allow only the tokenizer's own tokens where the library forces a text, which is asserted by
        tests/conformance/test_grammar.py."""
        tokens: list[int] = [] if self.library_matcher.is_stopped() else self.library_matcher.compute_ff_tokens()
        return tokens

    def note_accepted(self, token_id: int) -> None:
        """Keep a token that the library's matcher has accepted."""
        self._token_ids.append(token_id)

    def _enter(self, copy: _Copy) -> None:
        self._copy = copy
        self.copy_id = id(copy)  # equal for matchers whose work is not done at the same time
        copy.num_answers += 1
        copy.answers.add(self)
        self.replay()

    def replay(self) -> None:
        """Start the library's matcher again, for example after a token that it has refused."""
        self.library_matcher = self._copy.start.deep_copy()
        self.library_matcher.try_consume_tokens(self._token_ids)

    def _enter_another_copy(self) -> bool:
        """Replay the answer where no other answer has used up the states of the lexer. Return whether there is such a
        copy."""
        copy = self._grammar.replacement(self._copy) if self._copy.num_answers > 1 else None
        if copy is None:
            return False
        self._copy.answers.discard(self)
        self._enter(copy)
        return True

    def _raise_if_failed(self) -> None:
        if self.library_matcher.is_error():
            raise InvalidConstraint(self._grammar.readable(self.library_matcher.get_error()))
