"""The options of constrained decoding. Gateways and engines need the same ones."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option
from kvist.door import choice_of
from kvist.grammar.backends import GRAMMAR_BACKENDS


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarOptions:
    grammar_backend: str = choice_of(
        GRAMMAR_BACKENDS, "llguidance", "library that constrains answers to schemas and grammars"
    )
    grammar_compile_timeout_s: float = option(
        10.0,
        "maximum time to compile the schema or grammar of a request, waiting included; the request then gets an error",
        unit="s",
        minimum=0.01,
    )
