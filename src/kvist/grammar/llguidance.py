"""The backend `llguidance`: Earley parsing over derivatives of regular expressions. Compiles in milliseconds.

The library counts the work of compiling and of each mask, and stops at its limits: a constraint costs a bounded time
and a bounded memory. The library releases the interpreter lock meanwhile.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, cast

import llguidance
import numpy as np

from kvist.clock import MonotonicClock
from kvist.cores import num_usable_cores
from kvist.errors import InvalidConstraint
from kvist.grammar.backend import Matcher, Vocabulary, Words, accept_one_by_one, fill_one_by_one
from kvist.grammar.copies import LlguidanceGrammar, LlguidanceMatcher
from kvist.grammar.schema import compile_schema, parse_json, read_choices
from kvist.grammar.structural_tag import to_lark
from kvist.request import Constraint

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_BLANKS = r"[\x20\x0A\x0D\x09]{1,40}"  # without a limit, a model may write blanks for ever
_MAX_MESSAGE_CHARS = 500
_NUM_MASK_THREADS = max(
    1, min(8, num_usable_cores() // 2)
)  # the other cores plan and launch steps, in several processes
_NUM_KEPT_TEXTS, _MAX_KEPT_CHARS = 4096, 256  # forced texts whose tokens are kept
_MIN_PARALLEL = 4  # masks; to wake the threads costs as much as a few masks
# About 20 ms for a mask and 0.4 s to compile, at most; the library's own limits are for trusted grammars.
_LIMITS = llguidance.LLParserLimits(
    step_lexer_fuel=200_000, step_max_items=50_000, max_lexer_states=50_000, verbose_errors=False
)


class LlguidanceBackend:
    """A `GrammarBackend`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._compilers: dict[str, Callable[[Constraint], LlguidanceGrammar]] = {
            "json_schema": self._json_schema,
            "json_object": lambda constraint: self._json('{"type": "object"}', constraint),
            "regex": lambda constraint: self._grammar(llguidance.LLMatcher.grammar_from_regex(constraint.text)),
            "choice": self._choice,
            "grammar": lambda constraint: self._grammar(_lark(constraint.text)),
            "structural_tag": self._structural_tag,
        }

    @cached_property
    def _executor(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor(_NUM_MASK_THREADS)

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Wrapped(self.vocabulary)),
            n_vocab=self.vocabulary.size,
            eos_token=list(self.vocabulary.end_token_ids),
        )

    def compile(self, constraint: Constraint) -> LlguidanceGrammar:
        return self._compilers[constraint.kind](constraint)

    def accept(self, matchers: Sequence[Matcher], token_ids: Sequence[int]) -> dict[int, InvalidConstraint]:
        own = _own(matchers)
        places = [place for place in _by_copy(own) if not own[place].is_terminated]
        if len(places) < _MIN_PARALLEL or _NUM_MASK_THREADS == 1:  # the library refuses an empty list
            return accept_one_by_one(matchers, token_ids)
        pairs = [(own[place].library_matcher, token_ids[place]) for place in places]
        taken = self._executor.consume_token_par(pairs)
        left = set(range(len(matchers))).difference(places)  # terminated: an end token may follow
        for place, is_taken in zip(places, taken, strict=True):
            if is_taken:
                own[place].note_accepted(token_ids[place])
            else:
                own[place].replay()
                left.add(place)
        one_by_one = sorted(left)
        errors = accept_one_by_one([matchers[each] for each in one_by_one], [token_ids[each] for each in one_by_one])
        return {one_by_one[number]: error for number, error in errors.items()}

    def fill(self, matchers: Sequence[Matcher], allowed: Words) -> dict[int, InvalidConstraint]:
        if len(matchers) < _MIN_PARALLEL or _NUM_MASK_THREADS == 1:
            return fill_one_by_one(matchers, allowed)
        own = _own(matchers)
        pairs = [(own[place].library_matcher, place) for place in _by_copy(own)]
        self._executor.unsafe_compute_mask_ptr(pairs, allowed.ctypes.data, allowed[0].nbytes, len(pairs))
        failed = sorted(place for matcher, place in pairs if matcher.is_error())
        if not failed:
            return {}
        masks = np.empty((len(failed), allowed.shape[1]), dtype=np.int32)
        errors = fill_one_by_one([matchers[place] for place in failed], masks)  # perhaps in another copy
        allowed[failed] = masks
        return {failed[number]: error for number, error in errors.items()}

    def _json_schema(self, constraint: Constraint) -> LlguidanceGrammar:
        schema = parse_json(constraint.text)
        if not isinstance(schema, dict | bool):
            raise InvalidConstraint("a JSON schema is an object, true or false")
        return compile_schema(constraint.text, schema, lambda text: self._json(text, constraint))

    def _json(self, schema: str, constraint: Constraint) -> LlguidanceGrammar:
        options: JsonCompileOptions = {
            "item_separator": ",",
            "key_separator": ":",
            "whitespace_flexible": constraint.whitespace != "",
            "whitespace_pattern": _BLANKS if constraint.whitespace is None else constraint.whitespace or None,
            "coerce_one_of": not constraint.strict,
            "lenient": not constraint.strict,
        }
        # `true` and `false` are schemas too, but the library takes objects only
        wrapped = schema if schema.lstrip().startswith("{") else f'{{"allOf": [{schema}]}}'
        return self._grammar(llguidance.LLMatcher.grammar_from_json_schema(wrapped, overrides=options))

    def _choice(self, constraint: Constraint) -> LlguidanceGrammar:
        choices = " | ".join(map(json.dumps, read_choices(constraint.text)))
        return self._grammar(llguidance.LLMatcher.grammar_from_lark("start: " + choices))

    def _structural_tag(self, constraint: Constraint) -> LlguidanceGrammar:
        tokens = self.vocabulary.tokens
        special = {tokens.token_bytes(each).decode("utf-8", "replace"): each for each in tokens.special_token_ids}
        lark = to_lark(parse_json(constraint.text), special, {"whitespace_pattern": _BLANKS})
        return self._grammar(llguidance.LLMatcher.grammar_from_lark(lark))

    def _grammar(self, grammar: str) -> LlguidanceGrammar:
        clock = MonotonicClock()
        start_s = clock.now_s()
        start = self._start(grammar)
        error = start.get_error() or _error_of_first_token(start)
        if error:
            raise InvalidConstraint(_readable(error))
        return LlguidanceGrammar(
            start,
            partial(self._start, grammar),
            compile_s=clock.now_s() - start_s,
            end_token_ids=self.vocabulary.end_token_ids,
            max_copies=_NUM_MASK_THREADS,
            readable=_readable,
        )

    def _start(self, grammar: str) -> llguidance.LLMatcher:
        return llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)


def _own(matchers: Sequence[Matcher]) -> Sequence[LlguidanceMatcher]:
    assert all(isinstance(matcher, LlguidanceMatcher) for matcher in matchers[:1]), "these are matchers of this backend"
    return cast("Sequence[LlguidanceMatcher]", matchers)


def _by_copy(matchers: Sequence[LlguidanceMatcher]) -> list[int]:
    """Return the places of the matchers, those of one copy together: the library gives each thread a part of the list,
    and would let threads wait for each other if they shared a copy."""
    copies = [matcher.copy_id for matcher in matchers]
    return sorted(range(len(matchers)), key=copies.__getitem__)


class _Wrapped:
    """The tokenizer as the library reads it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokens = vocabulary.tokens
        self._encode_kept = lru_cache(_NUM_KEPT_TEXTS)(self._encode)  # the same keys are forced in every answer
        self.eos_token_id = vocabulary.end_token_ids[0]
        self.bos_token_id = None
        self.tokens = vocabulary.token_bytes()
        self.special_token_ids = vocabulary.special_token_ids()

    def __call__(self, text: str) -> list[int]:
        if isinstance(text, bytes):  # the library asks whether bytes are accepted
            raise TypeError("text only")
        return self._encode_kept(text) if len(text) <= _MAX_KEPT_CHARS else self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return self._tokens.encode(text, add_special_tokens=False)


def _lark(text: str) -> str:
    """Return a grammar in Lark's notation: it is given as such, or as EBNF or GBNF (`root ::= …`)."""
    if "::=" in text:
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            text = any_to_lark(text)
        except Exception as error:  # the library raises what its parser happens to raise
            raise InvalidConstraint(f"the grammar cannot be read: {error}"[:_MAX_MESSAGE_CHARS]) from error
    return llguidance.LLMatcher.grammar_from_lark(text)


def _error_of_first_token(start: llguidance.LLMatcher) -> str:
    """Return the error of the first mask and of the token after it; "" if there is none. Most constraints that are too
    complex, or have no answer, fail here."""
    mask = start.compute_bitmask()  # also warms the lexer
    if start.is_error():
        return start.get_error()
    words = np.frombuffer(mask, dtype=np.uint8)
    [first, *_] = np.flatnonzero(words)
    [bit, *_] = np.flatnonzero(np.unpackbits(words[first : first + 1], bitorder="little"))
    after = start.deep_copy()
    after.consume_token(int(first) * 8 + int(bit))
    return after.get_error()


_REASONS = {
    "oneOf constraints are not supported": (
        "oneOf is supported only where its alternatives exclude each other by type or by a constant: use anyOf"
    ),
    "NoExtension": "no finite answer satisfies the constraint",
    "TooComplex": "the constraint is too complex: enforcing it exceeds the limits on work per token",
    "Current row has": "the constraint has too many alternatives at one place: at most 2000 may begin alike",
    "recursion limit": "the constraint is nested too deeply",
}


def _readable(message: str) -> str:
    """Return a message of the library without its internal state."""
    for mark, reason in _REASONS.items():
        if mark in message:
            return reason
    text = re.split(r"\n<|\n +while processing", message)[0].replace("/$defs/root", "").strip()
    text = " ".join(re.split(r"\n +1 \| ", text)[0].split())
    text = re.sub(r"^Unimplemented keys: \[(.*)\]$", r"not supported: \1", text)
    return text[:_MAX_MESSAGE_CHARS]
