"""Answers that may begin with reasoning: their constraint holds for the part after it, and a budget bounds it.

BEGIN ──the mark before reasoning──► REASONING ──the mark after it───────────────────► GAP ──► REST
  │                                      └──the budget is used up──► CLOSING ──────────►│        ▲
  └──any other token─────────────────────────────────────────────────────────────────────────────┘

BEGIN      the first tokens, if the prompt has not begun the reasoning
REASONING  any token but those that end an answer; the marks are recognised in the text, like in `tools/parser.py`
CLOSING    the tokens of the text that ends a reasoning without budget, one after the other
GAP        a few blank tokens, which do not belong to the constrained text
REST       the constraint; without one, any token
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import msgspec
import numpy as np

from kvist.errors import InvalidConstraint
from kvist.grammar.backend import Grammar, GrammarBackend, Matcher, Vocabulary, Words, accept_one
from kvist.request import AFTER_REASONING, AfterReasoning, Constraint

_MAX_BLANK_TOKENS = 2  # between the reasoning and the constrained text
_BLANK = b" \t\r\n"


class ReasoningBackend:
    """A `GrammarBackend` that adds the kind "after_reasoning" to another one."""

    def __init__(self, inner: GrammarBackend) -> None:
        self._inner = inner
        self.vocabulary = inner.vocabulary
        self._tokens = cache(lambda end: _Tokens.of(inner.vocabulary, end))  # few marks are known

    def compile(self, constraint: Constraint) -> Grammar:
        if constraint.kind != AFTER_REASONING:
            return self._inner.compile(constraint)
        try:
            rule = msgspec.json.decode(constraint.text, type=AfterReasoning)
        except msgspec.MsgspecError as error:
            raise InvalidConstraint(f"the rule about reasoning cannot be read: {error}") from error
        then = None if rule.then is None else self._inner.compile(rule.then)
        return ReasoningGrammar(rule, then, self._tokens(rule.end.encode()), self.vocabulary)

    def accept(self, matchers: Sequence[Matcher], token_ids: Sequence[int]) -> dict[int, InvalidConstraint]:
        deciding = [_deciding(matcher) for matcher in matchers]
        inner = [place for place, matcher in enumerate(deciding) if matcher is not None]
        found = self._inner.accept(
            [matcher for matcher in deciding if matcher is not None], [token_ids[place] for place in inner]
        )
        errors = {inner[number]: error for number, error in found.items()}
        for place, matcher in enumerate(matchers):
            error = accept_one(matcher, (token_ids[place],)) if deciding[place] is None else None
            if error is not None:
                errors[place] = error
        return errors

    def fill(self, matchers: Sequence[Matcher], allowed: Words) -> dict[int, InvalidConstraint]:
        deciding = [_deciding(matcher) for matcher in matchers]
        inner = [matcher for matcher in deciding if matcher is not None]
        if len(inner) == len(matchers):
            return self._inner.fill(inner, allowed)
        places = [place for place, matcher in enumerate(deciding) if matcher is not None]
        for place, matcher in enumerate(matchers):
            if deciding[place] is None:
                matcher.fill(allowed[place])
        masks = np.empty((len(inner), allowed.shape[1]), dtype=np.int32)
        errors = self._inner.fill(inner, masks)
        allowed[places] = masks
        return {places[place]: error for place, error in errors.items()}


def _deciding(matcher: Matcher) -> Matcher | None:
    return matcher.inner if isinstance(matcher, ReasoningMatcher) else matcher


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """The tokens of a vocabulary, seen from a reasoning that ends with a certain mark."""

    every: Words
    blank: Words
    # tokens with text after the mark, and the text before them with which they complete it
    beyond: Sequence[tuple[int, bytes]]

    @staticmethod
    def of(vocabulary: Vocabulary, end: bytes) -> _Tokens:
        all_bytes = vocabulary.token_bytes()
        every = _words(vocabulary, range(vocabulary.size))
        blank = _words(vocabulary, [each for each, text in enumerate(all_bytes) if text and not text.strip(_BLANK)])
        beyond = [
            (token_id, end[: len(end) - size])
            for token_id, text in enumerate(all_bytes)
            if end[-1:] in text
            for size in range(1, len(end) + 1)
            if _goes_on(text, end[-size:], is_whole=size == len(end))
        ]
        return _Tokens(every=every, blank=blank, beyond=beyond)


def _goes_on(text: bytes, mark: bytes, *, is_whole: bool) -> bool:
    """Return whether `text` has something that is not blank after the (last part of the) mark."""
    place = text.find(mark) if is_whole else 0 if text.startswith(mark) else -1
    return place >= 0 and bool(text[place + len(mark) :].strip(_BLANK))


def _words(vocabulary: Vocabulary, token_ids: Sequence[int]) -> Words:
    bits = np.zeros(vocabulary.num_words * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


class ReasoningGrammar:
    """A `Grammar`."""

    def __init__(self, rule: AfterReasoning, then: Grammar | None, tokens: _Tokens, vocabulary: Vocabulary) -> None:
        self.rule = rule
        self.then = then
        self.tokens = tokens
        self.vocabulary = vocabulary
        self.ignored = () if then is None else then.ignored
        encode = vocabulary.tokens.encode
        self.begin_ids = encode(rule.begin, add_special_tokens=False)
        self.closing_ids = encode(rule.closing, add_special_tokens=False)
        self.first = self._first_words()  # of the part after the reasoning
        self.inside = tokens.every.copy()  # of the reasoning
        if then is not None:
            for token_id in vocabulary.end_token_ids:
                _clear(self.inside, token_id)

    def _first_words(self) -> Words:
        if self.then is None:
            return self.tokens.every
        words = np.zeros(self.vocabulary.num_words, dtype=np.int32)
        self.then.matcher().fill(words)
        return words

    def matcher(self) -> ReasoningMatcher:
        return ReasoningMatcher(self)


class _State(enum.Enum):
    BEGIN = enum.auto()
    REASONING = enum.auto()
    CLOSING = enum.auto()
    GAP = enum.auto()
    REST = enum.auto()


class ReasoningMatcher:
    """A `Matcher`."""

    def __init__(self, grammar: ReasoningGrammar) -> None:
        self._grammar = grammar
        self._then: Matcher | None = None if grammar.then is None else grammar.then.matcher()
        self._state = _State.BEGIN if grammar.rule.begin and not grammar.rule.is_open else _State.REASONING
        self._num_tokens = 0  # in this state
        self._tail = b""  # the last bytes of the text, of which a mark may still be completed
        self._enter(self._state)

    @property
    def is_terminated(self) -> bool:
        return self._state in (_State.GAP, _State.REST) and self._then is not None and self._then.is_terminated

    @property
    def inner(self) -> Matcher | None:
        """The matcher that decides about the next token alone; None if this one does."""
        return self._then if self._state is _State.REST else None

    def accept(self, token_ids: Sequence[int]) -> bool:
        for place, token_id in enumerate(token_ids):
            if self._state is _State.REST:
                return self._then is None or self._then.accept(token_ids[place:])
            if not self._accept(token_id):
                return False
        return True

    def _enter(self, state: _State) -> None:
        budget = self._grammar.rule.max_tokens
        if state is _State.REASONING and budget == 0:
            state = _State.CLOSING
        if state is _State.GAP and self._then is None:
            state = _State.REST
        self._state, self._num_tokens, self._tail = state, 0, b""

    def _accept(self, token_id: int) -> bool:
        grammar, rule = self._grammar, self._grammar.rule
        self._num_tokens += 1
        if self._state is _State.REASONING:
            return self._accept_reasoning(token_id)
        if self._state is _State.CLOSING:
            if token_id != grammar.closing_ids[self._num_tokens - 1]:
                return False
            if self._num_tokens == len(grammar.closing_ids):
                self._enter(_State.GAP)
            return True
        if self._state is _State.BEGIN and grammar.then is None:  # any token may come
            self._tail = (self._tail + self._text(token_id)).lstrip(_BLANK)
            if self._tail.startswith(rule.begin.encode()):
                self._enter(_State.REASONING)
            elif not rule.begin.encode().startswith(self._tail):
                self._enter(_State.REST)
            return True
        if self._state is _State.GAP:
            if not _has(grammar.first, token_id):
                return self._num_tokens <= _MAX_BLANK_TOKENS and _has(grammar.tokens.blank, token_id)
            self._enter(_State.REST)
            return self._then is None or self._then.accept([token_id])
        return self._accept_begin(token_id)

    def _accept_begin(self, token_id: int) -> bool:
        """The mark and the constrained text may begin with the same tokens."""
        grammar = self._grammar
        is_rest = self._then is not None and self._then.accept([token_id])
        if token_id != grammar.begin_ids[self._num_tokens - 1]:
            self._enter(_State.REST)
            return is_rest
        if not is_rest:
            self._then = None  # only the mark can follow
        if self._num_tokens == len(grammar.begin_ids):
            self._then = None if grammar.then is None else grammar.then.matcher()
            self._enter(_State.REASONING)
        return True

    def _accept_reasoning(self, token_id: int) -> bool:
        grammar, end = self._grammar, self._grammar.rule.end.encode()
        if self._then is not None and not self._may_follow(token_id):
            return False
        text = self._tail + self._text(token_id)
        if end in text:
            self._enter(_State.GAP)
        else:
            self._tail = text[1 - len(end) :] if len(end) > 1 else b""
            if grammar.rule.max_tokens is not None and self._num_tokens >= grammar.rule.max_tokens:
                self._enter(_State.CLOSING)
        return True

    def _may_follow(self, token_id: int) -> bool:
        if not _has(self._grammar.inside, token_id):
            return False
        beyond = self._grammar.tokens.beyond
        return not any(each == token_id and self._tail.endswith(before) for each, before in beyond)

    def _text(self, token_id: int) -> bytes:
        return self._grammar.vocabulary.tokens.token_bytes(token_id)

    def fill(self, allowed: Words) -> None:
        grammar = self._grammar
        if self._state is _State.REST:
            if self._then is None:
                allowed[:] = grammar.tokens.every
            else:
                self._then.fill(allowed)
        elif self._state is _State.REASONING:
            allowed[:] = grammar.inside
            for token_id, before in grammar.tokens.beyond if self._then is not None else ():
                if self._tail.endswith(before):
                    _clear(allowed, token_id)
        elif self._state is _State.CLOSING:
            allowed[:] = 0
            _set(allowed, grammar.closing_ids[self._num_tokens])
        elif self._state is _State.GAP:
            allowed[:] = grammar.first
            if self._num_tokens < _MAX_BLANK_TOKENS:
                allowed |= grammar.tokens.blank
        elif grammar.then is None:
            allowed[:] = grammar.tokens.every
        else:
            allowed[:] = 0
            if self._then is not None:
                self._then.fill(allowed)
            _set(allowed, grammar.begin_ids[self._num_tokens])

    def forced(self) -> Sequence[int]:
        if self._state is _State.CLOSING:
            return self._grammar.closing_ids[self._num_tokens :]
        return () if self.inner is None else self.inner.forced()


def _has(words: Words, token_id: int) -> bool:
    return bool(words.view(np.uint32)[token_id >> 5] >> (token_id & 31) & 1)


def _set(words: Words, token_id: int) -> None:
    words.view(np.uint32)[token_id >> 5] |= np.uint32(1 << (token_id & 31))


def _clear(words: Words, token_id: int) -> None:
    words.view(np.uint32)[token_id >> 5] &= ~np.uint32(1 << (token_id & 31))
