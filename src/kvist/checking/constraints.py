"""Finds the constraint of a request among the fields of OpenAI, vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from kvist.api.schemas import Constraints, Generation, NativeSampling, ResponseFormat, StructuredOutputs
from kvist.checking.kinds import check_kind
from kvist.errors import RequestError
from kvist.request import Constraint

_encode = msgspec.json.Encoder().encode
_FORMATS = {
    "text": (),
    "json_object": (),
    "json_schema": ("json_schema",),
    "structural_tag": ("structures", "triggers", "format"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedConstraint:
    constraint: Constraint
    param: str  # the field that has it
    has_calls: bool = False  # of tools
    unenforced: tuple[str, ...] = ()  # paths of parts of tools' schemas that the format of the calls cannot enforce
    parts: tuple[RequestedConstraint, ...] = ()  # compiled first, on their own: their errors name their fields


def requested_constraint(fields: Constraints, inside: str) -> RequestedConstraint | None:
    """Return the constraint of a request; None if it has none. `inside` is the prefix of the fields' names. Raises
    `RequestError` for several constraints, and for fields that contradict each other."""
    found = list(_given(fields))
    if len(found) > 1:
        names = " and ".join(f"`{inside}{name}`" for name, _ in found[:2])
        raise RequestError(f"{names} are two constraints; a request has at most one", param=inside + found[1][0])
    if not found:
        return None
    name, constraint = found[0]
    return RequestedConstraint(constraint=constraint, param=inside + name)


def _given(fields: Constraints) -> Iterator[tuple[str, Constraint]]:
    if fields.regex:
        yield "regex", Constraint(kind="regex", text=fields.regex)
    if fields.ebnf:
        yield "ebnf", Constraint(kind="grammar", text=fields.ebnf)
    if fields.structural_tag not in (None, "", {}):
        yield "structural_tag", Constraint(kind="structural_tag", text=_text(fields.structural_tag))
    if isinstance(fields, NativeSampling) and fields.json_schema not in (None, ""):
        yield "json_schema", Constraint(kind="json_schema", text=_text(fields.json_schema))
    if isinstance(fields, Generation):
        if fields.response_format is not None:
            yield from _of_response_format(fields.response_format)
        if fields.structured_outputs is not None:
            given, blanks = fields.structured_outputs, _whitespace(fields.structured_outputs)
            _check_structured(given, "structured_outputs.")
            for name, constraint in _structured(given, blanks):
                yield f"structured_outputs.{name}", constraint
        old = StructuredOutputs(
            json=fields.guided_json,
            regex=fields.guided_regex,
            choice=fields.guided_choice,
            grammar=fields.guided_grammar,
            whitespace_pattern=fields.guided_whitespace_pattern,
        )
        _check_structured(old, "guided_")
        for name, constraint in _structured(old, old.whitespace_pattern or None):
            yield f"guided_{name}", constraint


def _of_response_format(given: ResponseFormat) -> Iterator[tuple[str, Constraint]]:
    name = "response_format"
    check_kind(given, given.type, _FORMATS, name)
    if given.type == "text":
        return
    if given.type == "json_object":
        yield name, Constraint(kind="json_object")
    elif given.type == "json_schema":
        if given.json_schema is None:
            raise RequestError("`response_format.json_schema` is missing", param=f"{name}.json_schema")
        if given.json_schema.schema is None:
            yield name, Constraint(kind="json_object")
        else:
            text, strict = _text(given.json_schema.schema), bool(given.json_schema.strict)
            yield f"{name}.json_schema.schema", Constraint(kind="json_schema", text=text, strict=strict)
    elif given.type == "structural_tag":
        tag: dict[str, object] = {"structures": given.structures, "triggers": given.triggers}
        if given.format is not None:
            if given.structures or given.triggers:
                problem = f"`{name}.format` and `{name}.structures` are two forms of a structural tag; set only one"
                raise RequestError(problem, param=f"{name}.format")
            tag = {"format": given.format}
        yield name, Constraint(kind="structural_tag", text=_text(tag))
    else:
        known = ", ".join(_FORMATS)
        raise RequestError(f"`response_format.type` is {given.type!r}; supported: {known}", param=f"{name}.type")


def _structured(given: StructuredOutputs, whitespace: str | None) -> Iterator[tuple[str, Constraint]]:
    if given.json not in (None, ""):
        yield "json", Constraint(kind="json_schema", text=_text(given.json), whitespace=whitespace)
    if given.json_object:
        yield "json_object", Constraint(kind="json_object", whitespace=whitespace)
    if given.regex:
        yield "regex", Constraint(kind="regex", text=given.regex)
    if given.choice:
        yield "choice", Constraint(kind="choice", text=_text(given.choice))
    if given.grammar:
        yield "grammar", Constraint(kind="grammar", text=given.grammar)
    if given.structural_tag not in (None, "", {}):
        yield "structural_tag", Constraint(kind="structural_tag", text=_text(given.structural_tag))


def _check_structured(given: StructuredOutputs, inside: str) -> None:
    """Raise `RequestError` for a field without any effect on the answer. `inside`: prefix of the fields' names."""
    if given.json not in (None, "") or given.json_object:
        return
    for name in ("disable_any_whitespace", "whitespace_pattern"):
        if getattr(given, name):
            raise RequestError(f"`{inside}{name}` needs `{inside}json`: it is about JSON", param=inside + name)


def _whitespace(given: StructuredOutputs) -> str | None:
    if not given.disable_any_whitespace:
        return given.whitespace_pattern or None
    if given.whitespace_pattern:
        raise RequestError(
            "`whitespace_pattern` and `disable_any_whitespace` contradict each other: set only one of them",
            param="structured_outputs.whitespace_pattern",
        )
    return ""


def _text(value: object) -> str:
    return value if isinstance(value, str) else _encode(value).decode()
