"""The form of an answer: a constraint for the server, and the value that the program gets.

Types are Python's own words for a form: dataclasses, msgspec Structs and TypedDicts go through msgspec, a pydantic
model through its own methods, so that pydantic is not needed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import msgspec

from kvist.errors import ProgramError
from kvist.lang.positions import here
from kvist.planning.prompt import unsendable

Scalar: TypeAlias = int | float | bool | str
_SCALARS: dict[type[object], str] = {
    int: r"-?(0|[1-9][0-9]{0,17})",
    float: r"-?(0|[1-9][0-9]{0,14})\.[0-9]{1,15}",
    bool: "(true|false)",
    str: r'"[^"\\\n]*"',
}
_NAMED: dict[str, type[object]] = {"int": int, "float": float, "bool": bool, "str": str}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerType:
    """`kind` is "" (any text), "regex" or "json_schema"; `source` is the pattern, or the schema as JSON."""

    kind: str = ""
    source: str = ""
    argument: str = ""  # of the program, which gave the form
    python_type: type[object] | None = None

    @classmethod
    def of(
        cls,
        *,
        regex: str | None,
        json_schema: str | Mapping[str, object] | None,
        python_type: type[object] | None,
        dtype: type[Scalar] | str | None,
    ) -> AnswerType:
        """Raises `ProgramError` for two forms, or for one that cannot be enforced."""
        given = {"regex": regex, "json_schema": json_schema, "type": python_type, "dtype": dtype}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ProgramError(f"{here()}: an answer has one form: give only one of {' and '.join(names)}")
        if regex is not None:
            _check_pattern(regex)
            return cls(kind="regex", source=regex, argument="regex")
        if json_schema is not None:
            return cls(kind="json_schema", source=_schema_text(json_schema), argument="json_schema")
        if dtype is not None:
            scalar = _NAMED.get(dtype) if isinstance(dtype, str) else dtype
            if scalar not in _SCALARS:
                raise ProgramError(f"{here()}: `dtype` must be one of int, float, bool and str, not {dtype!r}")
            return cls(kind="regex", source=_SCALARS[scalar], argument="dtype", python_type=scalar)
        if python_type is not None:
            return cls(kind="json_schema", source=_schema_of(python_type), argument="type", python_type=python_type)
        return cls()

    def value_of(self, text: str) -> object:
        """Return the program's value of an answer. Raises `ValueError` where the text does not have the form, as one
        that `max_tokens` has cut off."""
        wanted = self.python_type
        if wanted is None:
            return text
        if wanted is bool:
            return {"true": True, "false": False}[text.strip()]
        if wanted in (int, float):
            return cast(Any, wanted)(text)
        if wanted is str:
            return text.strip()[1:-1]
        if hasattr(wanted, "model_validate_json"):
            return cast(Any, wanted).model_validate_json(text)
        return msgspec.json.decode(text, type=wanted)


TEXT = AnswerType()


def _check_pattern(pattern: str) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise ProgramError(f"{here()}: `regex` must be a text that is not empty, not {pattern!r}")
    _check_sendable(pattern, "regex")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ProgramError(f"{here()}: `regex` is not a regular expression: {error}") from error


def _check_sendable(text: str, argument: str) -> None:
    if bad := unsendable(text):
        raise ProgramError(f"{here()}: `{argument}` contains {bad!r}, which UTF-8 cannot encode: remove it")


def _schema_text(schema: str | Mapping[str, object]) -> str:
    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(found, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ProgramError(f"{here()}: `json_schema` is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ProgramError(f"{here()}: `json_schema` must be a JSON object, not {text[:40]!r}")
    _check_sendable(text, "json_schema")
    return text


def _schema_of(python_type: type[object]) -> str:
    if hasattr(python_type, "model_json_schema"):
        return _pydantic_schema(python_type)
    if python_type in _SCALARS:
        raise ProgramError(f"{here()}: `type` is for objects and lists; for {python_type.__name__} use `dtype`")
    try:
        return msgspec.json.encode(_closed(msgspec.json.schema(python_type))).decode()
    except TypeError as error:
        name = getattr(python_type, "__name__", repr(python_type))
        raise ProgramError(
            f"{here()}: `type` {name} has no JSON schema: use a dataclass, a msgspec Struct, a TypedDict, a pydantic "
            "model or a list of one"
        ) from error


def _pydantic_schema(model: type[object]) -> str:
    try:
        text = json.dumps(cast(Any, model).model_json_schema(), ensure_ascii=False)
    except Exception as error:  # of pydantic, which is not imported here
        raise ProgramError(f"{here()}: `type` {model.__name__} has no JSON schema: {error}") from error
    _check_sendable(text, "type")
    return text


def _closed(schema: object) -> object:
    """Return the schema without descriptions of Python, and with objects closed to further properties."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _closed(value) for key, value in schema.items()}
    if found.get("type") == "object" and isinstance(found.get("properties"), dict):
        found.setdefault("additionalProperties", False)
    return found
