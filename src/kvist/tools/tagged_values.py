"""The grammar of one value that is written as plain text between tags, from its JSON Schema.

A value that may be a string is plain text, and every other value is JSON: the parser decides by the types alone
(`values.typed`), and so does this file. The text of a string does not contain the marks that end it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvist.errors import InvalidConstraint
from kvist.tools.tags import Tag, any_text, const, json_schema, one_of, regex, sequence, tag
from kvist.tools.values import resolved, types_of

NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "nullable"}
_STRING = {"type", "enum", "const", "minLength", "maxLength"}
_CHOICES = ("anyOf", "oneOf")
_MAX_DEPTH = 8  # of choices inside of each other
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True, slots=True)
class Unenforced:
    """The parts of a tool's schema that the format of the calls cannot enforce. Mutable: filled while the grammar is
    written."""

    strict: bool
    paths: list[str] = field(default_factory=list)

    def add(self, problem: str, path: str) -> None:
        """Raises `InvalidConstraint` if the tool is strict."""
        if self.strict:
            raise InvalidConstraint(problem, param=path)
        self.paths.append(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The text around a value."""

    begin: str
    end: str
    breaks: Sequence[str]  # end a value, too: in no value
    newlines: bool  # one newline on each side of the text does not belong to the value

    def holds(self, text: str) -> bool:
        return not any(mark in text for mark in (self.end, *self.breaks))


def tagged_value(schema: object, root: Mapping[str, object], frame: Frame, unenforced: Unenforced, path: str) -> Tag:
    """Return the value in its frame. `root`: the schema of all arguments, whose definitions may be referred to. Raises
    `InvalidConstraint` for a part of the schema of a string that cannot be enforced, if the tool is strict."""
    types, line = types_of(schema, root), "\n" if frame.newlines else ""
    if types and "string" not in types:
        return tag(frame.begin + line, json_schema(embedded(schema, root), strict=unenforced.strict), line + frame.end)
    text = _StringSchema(types, unenforced)
    text.read(schema, path, root=root)
    text.keep_writable(frame, path)
    return text.tag(frame, line)


def embedded(schema: object, root: Mapping[str, object]) -> Mapping[str, object]:
    """Return the schema of a part with the definitions of the whole, to which it may refer."""
    own = schema if isinstance(schema, Mapping) else {}
    return {name: root[name] for name in _DEFINITIONS if name in root} | dict(own)


class _StringSchema:
    """The demands of a schema on a value that may be a string. Mutable: filled by `read`."""

    def __init__(self, types: frozenset[str], unenforced: Unenforced) -> None:
        self._has_null = "null" in types
        self._unenforced = unenforced
        self._texts: list[str] | None = None  # the only values; None: any
        self._least = 0  # characters
        self._most: int | None = None

    def read(self, schema: object, path: str, *, root: Mapping[str, object], depth: int = 0) -> None:
        if depth == _MAX_DEPTH:
            self._refuse("a choice between choices, nested this deeply, cannot be enforced", path)
            return
        known = resolved(schema, root)
        for name in known.keys() - NOTES - _STRING - {*_DEFINITIONS, *_CHOICES}:
            self._refuse(f"`{name}` cannot be enforced", f"{path}.{name}")
        for name in _CHOICES:
            self._read_choices(known.get(name), root, f"{path}.{name}", depth + 1)
        texts = [known["const"]] if "const" in known else known.get("enum")
        if isinstance(texts, list):
            before = self._texts
            self._texts = [one for one in texts if isinstance(one, str) and (before is None or one in before)]
            if not self._texts:
                self._refuse("none of the values is a string", path)
        least, most = known.get("minLength"), known.get("maxLength")
        self._least = max(self._least, least if isinstance(least, int) else 0)
        if isinstance(most, int):
            self._most = most if self._most is None else min(most, self._most)

    def _read_choices(self, choices: object, root: Mapping[str, object], path: str, depth: int) -> None:
        """Of several kinds of strings, at most one may have limits: the text of a string does not show its kind."""
        strings: list[tuple[object, str]] = []
        for index, choice in enumerate(choices if isinstance(choices, list) else ()):
            types = types_of(choice, root)
            if "string" in types or not types:
                strings.append((choice, f"{path}[{index}]"))
        if len(strings) == 1:
            self.read(*strings[0], root=root, depth=depth)
        elif any(resolved(choice, root).keys() - {"type"} - NOTES for choice, _ in strings):
            self._refuse("several kinds of strings look alike", path)

    def _refuse(self, problem: str, path: str) -> None:
        self._unenforced.add(f"{problem} where the model writes strings as plain text", path)

    def keep_writable(self, frame: Frame, path: str) -> None:
        """Keep the values that are within the limits and without the marks that end a value."""
        if not self._texts:
            return
        most = math.inf if self._most is None else self._most
        texts = [text for text in self._texts if self._least <= len(text) <= most]
        if not texts:
            self._refuse("none of the values has a length within the limits", path)
        self._texts = [text for text in texts if frame.holds(text)]
        if texts and not self._texts:
            self._refuse(f"each of the values contains {frame.end!r} or another mark that ends a value", path)

    def tag(self, frame: Frame, line: str) -> Tag:
        """Return the text of the value in its frame, with `line` on both sides."""
        begin, end = frame.begin + line, frame.end
        if self._texts:
            shown = [*self._texts, *(["null"] if self._has_null else [])]
            return tag(begin, one_of([const(text) for text in shown]), line + end)
        # Characters are counted in texts without `<`, with which the end begins.
        if self._most is not None:
            return tag(begin, regex(f"[^<]{{{min(self._least, self._most)},{self._most}}}"), line + end)
        if self._least:
            # the last of the least characters is not a newline: a newline before the end is not part of the value
            first = regex(f"[^<]{{{self._least - 1}}}[^<\\n]")
            return sequence([const(begin), first, tag("", any_text(frame.breaks), end)])
        return tag(begin, any_text(frame.breaks), end)
