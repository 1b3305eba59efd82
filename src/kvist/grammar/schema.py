"""PURE. Walks JSON schemas: their limits, and the part of a schema that a backend refuses.

Backends name the reason of a refusal, not the place. `find_fault` finds the place: it compiles the parts of the schema
on their own, from the outside to the inside, and stops at a part that fails while none of its own parts does. A part is
at fault if it fails for the same reason, or if every document needs it: an optional part may be impossible.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from kvist.errors import InvalidConstraint
from kvist.grammar.endless import find_endless
from kvist.grammar.schema_parts import Path, part_alone, parts_of, path_text, target_of, value_at

MAX_DEPTH = 100  # of lists and objects inside each other; JSON parsers of the backends stop at 128
_MAX_TRIES = 256  # compiled parts; a part takes less time than the schema

T = TypeVar("T")


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises `InvalidConstraint`."""
    if _depth(text) > MAX_DEPTH:  # before the parser, which recurses
        raise InvalidConstraint(f"lists and objects are nested more than {MAX_DEPTH} levels deep, which is the limit")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidConstraint(f"this is not valid JSON: {error}") from error


def read_choices(text: str) -> list[str]:
    """Return the texts of a constraint of the kind "choice". Raises `InvalidConstraint`."""
    choices = parse_json(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) for each in choices):
        raise InvalidConstraint("the choices must be a list of texts, at least one")
    return choices


def compile_schema(text: str, schema: Any, compile_text: Callable[[str], T]) -> T:
    """Return what `compile_text` makes of a schema, given as a text and parsed. Raises the `InvalidConstraint` of
    `compile_text`, with the path of the part at fault."""

    def error_of(part: str) -> str | None:
        try:
            compile_text(part)
        except InvalidConstraint as error:
            return error.message
        return None

    try:
        compiled = compile_text(text)
    except InvalidConstraint as error:
        path, message = find_fault(schema, error.message, error_of)
        raise InvalidConstraint(message, param=path_text(path)) from error
    endless = find_endless(schema)
    if endless is not None:
        raise InvalidConstraint("no finite answer satisfies the constraint", param=path_text(endless))
    return compiled


def _depth(text: str) -> int:
    """Return the depth of nesting, or more: brackets inside of strings count only where they open."""
    depth = deepest = 0
    in_string = escaped = False
    for char in text:
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest


def find_fault(schema: Any, message: str, fails: Callable[[str], str | None]) -> tuple[Path, str]:
    """Return the path of the innermost part at fault, and its error. `message` is the error of the whole schema; the
    path is () if no single part is at fault. `fails` returns the error of a schema, or None if the schema compiles."""
    num_tries = 0
    seen: set[Path] = set()

    def error_at(path: Path) -> str | None:
        nonlocal num_tries
        num_tries += 1
        return fails(json.dumps(part_alone(schema, path))) if num_tries <= _MAX_TRIES else None

    place: Path = ()
    while True:
        seen.add(place)
        inside = (
            path
            for path in parts_of(value_at(schema, place), place, schema)
            if path not in seen and target_of(value_at(schema, path), schema) not in seen
        )
        needed: tuple[Path, str] | None = None
        for path in inside:
            error = error_at(path)
            if error == message:
                place = path
                break
            if error is not None and needed is None and _is_needed(schema, place, path):
                needed = path, error
        else:
            if needed is None:
                return place, message
            place, message = needed


def _is_needed(root: Any, place: Path, part: Path) -> bool:
    """Return whether the part is a property that every object of the schema at `place` has."""
    if part[:-1] != (*place, "properties"):
        return False
    required = value_at(root, place).get("required")
    return isinstance(required, list) and part[-1] in required
