"""PURE. Finds schemas that no finite document satisfies: a list item that needs a further list item, and so on.

Backends compile such a schema, and its answers never end. A part of a schema has a finite document if the parts that it
needs have one. `find_endless` starts with the parts that need no others, and goes on to the parts that need these; a
part that is never reached is endless. A part that this file cannot judge counts as finite.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

from kvist.grammar.schema_parts import Path, target_of, value_at

_Group = tuple[Path, ...]  # one of these parts must be finite


def find_endless(schema: Any) -> Path | None:
    """Return the path of the part because of which no finite document satisfies the schema; None if there is one."""
    needs: dict[Path, list[_Group]] = {}
    needed_by: defaultdict[Path, list[Path]] = defaultdict(list)
    found: deque[Path] = deque([()])
    while found:
        path = found.popleft()
        if path in needs:
            continue
        needs[path] = list(_needs(schema, path))
        for group in needs[path]:
            for part in group:
                needed_by[part].append(path)
                found.append(part)
    finite: set[Path] = set()
    ready = deque(path for path, groups in needs.items() if not groups)
    while ready:
        path = ready.popleft()
        if path in finite:
            continue
        finite.add(path)
        ready += (each for each in needed_by[path] if each not in finite and _is_met(needs[each], finite))
    return None if () in finite else _innermost(needs, finite)


def _is_met(groups: list[_Group], finite: set[Path]) -> bool:
    return all(any(part in finite for part in group) for group in groups)


def _innermost(needs: dict[Path, list[_Group]], finite: set[Path]) -> Path:
    """Follow the endless parts from the root to the first one that was passed before; return the one that needs it."""
    place: Path = ()
    passed = {place}
    while True:
        group = next(group for group in needs[place] if not any(part in finite for part in group))
        if group[0] in passed:
            return place
        place = group[0]
        passed.add(place)


def _needs(root: Any, path: Path) -> Iterator[_Group]:
    """Yield the groups of parts that a document of the part at `path` needs."""
    schema = value_at(root, path)
    if not isinstance(schema, dict):
        return
    target = target_of(schema, root)
    if target is not None:
        yield (target,)
    if isinstance(schema.get("allOf"), list):
        yield from (((*path, "allOf", index),) for index in range(len(schema["allOf"])))
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list) and schema[name]:
            yield tuple((*path, name, index) for index in range(len(schema[name])))
    if schema.get("type") == "object":
        yield from _needs_of_object(schema, path)
    elif schema.get("type") == "array":
        yield from _needs_of_array(schema, path)


def _needs_of_object(schema: dict[str, Any], path: Path) -> Iterator[_Group]:
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, dict) and isinstance(required, list):
        names = {name for name in required if isinstance(name, str)}
        yield from (((*path, "properties", name),) for name in properties if name in names)


def _needs_of_array(schema: dict[str, Any], path: Path) -> Iterator[_Group]:
    fewest, first = schema.get("minItems"), schema.get("prefixItems")
    if not isinstance(fewest, int):
        return
    num_first = len(first) if isinstance(first, list) else 0
    yield from (((*path, "prefixItems", index),) for index in range(min(fewest, num_first)))
    if fewest > num_first and "items" in schema:
        yield ((*path, "items"),)
