"""PURE. Walks JSON schemas: their limits, and the part of a schema that a backend refuses.

Backends name the reason of a refusal, not the place. `find_fault` finds the place: it compiles the parts of the schema
on their own, from the outside to the inside, and stops at a part that fails for the same reason while none of its own
parts does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from kvist.errors import InvalidConstraint

MAX_DEPTH = 100  # of lists and objects inside each other; JSON parsers of the backends stop at 128
_MAX_TRIES = 256  # compiled parts; a part takes less time than the schema

_ONE = (
    "items",
    "additionalProperties",
    "additionalItems",
    "contains",
    "not",
    "if",
    "then",
    "else",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
)
_LISTS = ("prefixItems", "allOf", "anyOf", "oneOf", "items")
_NAMED = ("properties", "patternProperties", "dependentSchemas")

Path = tuple[str | int, ...]
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
        return compile_text(text)
    except InvalidConstraint as error:
        path = find_fault(schema, error.message, error_of)
        raise InvalidConstraint(error.message, param=path_text(path)) from error


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


def path_text(path: Path) -> str:
    """Return a path as the API writes it: `properties.a.anyOf[0]`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def find_fault(schema: Any, message: str, fails: Callable[[str], str | None]) -> Path:
    """Return the path of the innermost part that fails with `message`, the error of the whole schema; () if no single
    part does. `fails` returns the error of a schema, or None if the schema compiles."""
    num_tries = 0
    seen: set[Path] = set()

    def is_faulty(path: Path) -> bool:
        nonlocal num_tries
        num_tries += 1
        return num_tries <= _MAX_TRIES and fails(json.dumps(_part(schema, path))) == message

    place: Path = ()
    while True:
        seen.add(place)
        inside = (
            path
            for path in _parts_of(_at(schema, place), place, schema)
            if path not in seen and _target(_at(schema, path), schema) not in seen
        )
        faulty = next(filter(is_faulty, inside), None)
        if faulty is None:
            return place
        place = faulty


def _parts_of(schema: Any, path: Path, root: Any) -> Iterator[Path]:
    """Yield the paths of the schemas that `schema` consists of."""
    if not isinstance(schema, dict):
        return
    target = _target(schema, root)
    if target is not None:
        yield target
    for name in _ONE:
        if isinstance(schema.get(name), dict):
            yield (*path, name)
    for name in _LISTS:
        if isinstance(schema.get(name), list):
            yield from ((*path, name, index) for index in range(len(schema[name])))
    for name in _NAMED:
        if isinstance(schema.get(name), dict):
            yield from ((*path, name, key) for key in schema[name])


def _target(schema: Any, root: Any) -> Path | None:
    """Return the path that the reference of a schema names, if it has one into the same document."""
    reference = schema.get("$ref") if isinstance(schema, dict) else None
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    value, path = root, list[str | int]()
    for step in reference[2:].split("/"):
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and key in value:
            value = value[key]
            path.append(key)
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
            path.append(int(key))
        else:
            return None
    return tuple(path)


def _at(schema: Any, path: Path) -> Any:
    for step in path:
        schema = schema[step]
    return schema


def _part(root: Any, path: Path) -> Any:
    """Return a schema that is the part of `root` at `path`, in which references still find their targets."""
    part = _moved(_at(root, path))
    if not isinstance(part, dict):
        return part
    # Only the definitions: a keyword of the root beside them would apply to the part.
    own = part.get("$defs")
    return {**part, "$defs": {**(own if isinstance(own, dict) else {}), "root": _moved(root)}}


def _moved(schema: Any) -> Any:
    """Return the schema with references to the document changed into references to `$defs`. The depth is limited."""
    if isinstance(schema, Mapping):
        return {
            key: "#/$defs/root" + value[1:]
            if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/"))
            else _moved(value)
            for key, value in schema.items()
        }
    return [_moved(each) for each in schema] if isinstance(schema, list) else schema
