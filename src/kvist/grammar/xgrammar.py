"""The backend `xgrammar`: pushdown automata, with a mask for each of their states computed in advance.

Its masks are cheaper than llguidance's and its compilation takes seconds. The library has no limit on that work: the
deadline of compiler.py ends the wait, not the work. The package is an extra: `pip install 'kvist[xgrammar]'`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from kvist.errors import ConfigError, InvalidConstraint
from kvist.grammar.backend import Matcher, Vocabulary, Words, accept_one_by_one, fill_one_by_one
from kvist.grammar.schema import compile_schema, parse_json, read_choices
from kvist.grammar.structural_tag import of_structures
from kvist.request import Constraint

_NUM_THREADS = 2
_MAX_BLANKS = 40  # between two tokens of JSON
_CACHE_BYTES = 256 << 20
_MAX_MESSAGE_CHARS = 500


class XgrammarBackend:
    """A `GrammarBackend`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        try:
            import xgrammar
        except ImportError as error:
            raise ConfigError(
                f"--grammar-backend xgrammar needs the package xgrammar ({error}): pip install 'kvist[xgrammar]', or "
                "use llguidance",
                param="grammar_backend",
            ) from error
        self._library: Any = xgrammar
        self.vocabulary = vocabulary
        self._compilers: dict[str, Callable[[Constraint], Any]] = {
            "json_schema": self._json_schema,
            "json_object": lambda constraint: self._json('{"type": "object"}', constraint),
            "regex": lambda constraint: self._compiler.compile_regex(constraint.text),
            "choice": self._choice,
            "grammar": self._grammar,
            "structural_tag": self._structural_tag,
        }

    @cached_property
    def _compiler(self) -> Any:
        tokens = self._library.TokenizerInfo(
            self.vocabulary.token_bytes(),
            self._library.VocabType.RAW,
            vocab_size=self.vocabulary.size,
            stop_token_ids=list(self.vocabulary.end_token_ids),
        )
        return self._library.GrammarCompiler(tokens, max_threads=_NUM_THREADS, cache_limit_bytes=_CACHE_BYTES)

    def compile(self, constraint: Constraint) -> XgrammarGrammar:
        with _library_errors():
            return XgrammarGrammar(self._library, self._compilers[constraint.kind](constraint), self.vocabulary)

    def accept(self, matchers: Sequence[Matcher], token_ids: Sequence[int]) -> dict[int, InvalidConstraint]:
        return accept_one_by_one(matchers, token_ids)

    def fill(self, matchers: Sequence[Matcher], allowed: Words) -> dict[int, InvalidConstraint]:
        return fill_one_by_one(matchers, allowed)  # a mask takes about two microseconds

    def _json_schema(self, constraint: Constraint) -> Any:
        schema = parse_json(constraint.text)
        return compile_schema(constraint.text, schema, lambda text: self._json(text, constraint))

    def _json(self, schema: str, constraint: Constraint) -> Any:
        if constraint.whitespace:
            raise InvalidConstraint("a whitespace pattern needs --grammar-backend llguidance", param="whitespace")
        blanks = constraint.whitespace is None
        with _library_errors():
            return self._compiler.compile_json_schema(
                schema,
                any_whitespace=blanks,
                separators=(",", ":"),
                strict_mode=False,  # else properties that the schema does not name would be forbidden
                max_whitespace_cnt=_MAX_BLANKS if blanks else None,
            )

    def _choice(self, constraint: Constraint) -> Any:
        choices = " | ".join(map(_ebnf_text, read_choices(constraint.text)))
        return self._compiler.compile_grammar("root ::= " + choices)

    def _structural_tag(self, constraint: Constraint) -> Any:
        tag = parse_json(constraint.text)
        if isinstance(tag, dict) and "format" not in tag:
            tag = {"type": "structural_tag", "format": of_structures(tag)}
        return self._compiler.compile_structural_tag(tag)

    def _grammar(self, constraint: Constraint) -> Any:
        if "::=" not in constraint.text:
            return self._compiler.compile_lark(constraint.text)
        return self._compiler.compile_grammar(constraint.text)


class XgrammarGrammar:
    """A `Grammar`."""

    ignored: tuple[str, ...] = ()

    def __init__(self, library: Any, compiled: Any, vocabulary: Vocabulary) -> None:
        self._library = library
        self._compiled = compiled
        self._vocabulary = vocabulary

    def matcher(self) -> XgrammarMatcher:
        return XgrammarMatcher(self._library.GrammarMatcher(self._compiled), self._vocabulary)


class XgrammarMatcher:
    """A `Matcher`. The library's matcher takes nothing after an end token; here, end tokens may follow."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    @property
    def is_terminated(self) -> bool:
        return bool(self._matcher.is_terminated())

    def accept(self, token_ids: Sequence[int]) -> bool:
        for token_id in token_ids:
            if self._matcher.is_terminated():
                if token_id not in self._vocabulary.end_token_ids:
                    return False
            elif not self._matcher.accept_token(token_id):
                return False
        return True

    def fill(self, allowed: Words) -> None:
        if self._matcher.is_terminated():
            allowed[:] = 0
            for token_id in self._vocabulary.end_token_ids:
                allowed.view("uint32")[token_id >> 5] |= 1 << (token_id & 31)
        elif not self._matcher.fill_next_token_bitmask(allowed.reshape(1, -1)):
            allowed[:] = -1  # every token is allowed, and the library has written nothing
        if self._vocabulary.size % 32:
            allowed.view("uint32")[-1] &= (1 << self._vocabulary.size % 32) - 1

    def forced(self) -> Sequence[int]:
        return ()  # the library knows a forced text, not its tokens


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """Raise `InvalidConstraint` for the errors of the library: RuntimeError and others."""
    try:
        yield
    except InvalidConstraint:
        raise
    except Exception as error:
        raise InvalidConstraint(_readable(str(error))) from error


def _ebnf_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _readable(message: str) -> str:
    """Return a message of the library without the places in its sources."""
    return re.sub(r"^\[[^\]]*\] \S+:\d+: ", "", message).strip()[:_MAX_MESSAGE_CHARS]
