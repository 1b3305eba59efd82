"""The jobs of the compiler of constraints, and its reports."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.request import Constraint, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileGrammar:
    """Compile the constraint of a request. Reported by one `GrammarCompiled`, which may come after its request has
    ended."""

    request_id: RequestId
    constraint: Constraint


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarCompiled:
    """The compilation is done. May come together with the request, of which no job is planned then."""

    request_id: RequestId
    error_code: str | None = None  # of errors.py; None: the grammar is ready
    message: str = ""
