"""PURE. The parts of JSON schemas, by their paths: `("properties", "a", "anyOf", 0)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str | int, ...]

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


def path_text(path: Path) -> str:
    """Return a path as the API writes it: `properties.a.anyOf[0]`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def parts_of(schema: Any, path: Path, root: Any) -> Iterator[Path]:
    """Yield the paths of the schemas that `schema` consists of."""
    if not isinstance(schema, dict):
        return
    target = target_of(schema, root)
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


def target_of(schema: Any, root: Any) -> Path | None:
    """Return the path that the reference of a schema names, if it has one into the same document."""
    reference = schema.get("$ref") if isinstance(schema, dict) else None
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return () if reference == "#" else None
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


def value_at(schema: Any, path: Path) -> Any:
    for step in path:
        schema = schema[step]
    return schema


def part_alone(root: Any, path: Path) -> Any:
    """Return a schema that is the part of `root` at `path`, in which references still find their targets."""
    part = _moved(value_at(root, path))
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
