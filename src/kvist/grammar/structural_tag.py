"""PURE. Translates structural tags, in xgrammar's format, to a grammar for llguidance.

A structural tag is free text in which certain parts have a form: a tag begins with a given text, has a content, and
ends with a given text. Both forms are known: `structures` with `triggers`, and `format`, whose types are the methods of
`_Translation` below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from kvist.errors import InvalidConstraint
from kvist.grammar.schema_parts import Path, path_text

MAX_RULES = 2048
_TEXT = r"/(.|\n)*/"


def to_lark(tag: Any, special_tokens: Mapping[str, int], schema_options: Mapping[str, object]) -> str:
    """Return the grammar in Lark's notation. `special_tokens`: texts that stand for one token each where the tag spells
    them, and their ids. `schema_options`: the library's options for JSON schemas. Raises `InvalidConstraint` with the
    path of the faulty part as `param`."""
    return _Translation(special_tokens, schema_options).grammar(tag)


class _Translation:
    """Mutable: the rules so far."""

    def __init__(self, special_tokens: Mapping[str, int], schema_options: Mapping[str, object]) -> None:
        longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._ids = special_tokens
        self._schema_options = schema_options
        self._rules: list[str] = []
        self._types = {
            "const_string": self._const_string,
            "json_schema": self._json_schema,
            "regex": self._regex,
            "any_text": self._any_text,
            "sequence": self._sequence,
            "or": self._or,
            "tag": self._tag,
            "triggered_tags": self._triggered_tags,
            "tags_with_separator": self._tags_with_separator,
        }

    def grammar(self, tag: Any) -> str:
        outer = _object(tag, ())
        if "format" in outer:
            start = self._format(outer["format"], ("format",))
        else:
            start = self._triggered_tags(of_structures(outer), ())
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules, ""])

    def _format(self, value: Any, path: Path) -> str:
        kind = _object(value, path).get("type")
        translate = self._types.get(kind) if isinstance(kind, str) else None
        if translate is None:
            known = ", ".join(self._types)
            raise _fault(f"the type {kind!r} is not supported; supported: {known}", (*path, "type"))
        return translate(value, path)

    def _rule(self, body: str, attributes: str = "") -> str:
        if len(self._rules) >= MAX_RULES:
            raise _fault(f"more than {MAX_RULES} parts, which is the limit", ())
        name = f"part_{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def _literal(self, text: str) -> str:
        """Return the symbols of a fixed text; the empty text has none."""
        if self._special is None:
            return json.dumps(text) if text else ""
        pieces = [piece for piece in self._special.split(text) if piece]
        return " ".join(f"<[{self._ids[piece]}]>" if piece in self._ids else json.dumps(piece) for piece in pieces)

    def _const_string(self, value: Mapping[str, Any], path: Path) -> str:
        return self._literal(_text(value, "value", path)) or '""'

    def _json_schema(self, value: Mapping[str, Any], path: Path) -> str:
        schema = value.get("json_schema")
        if not isinstance(schema, dict | bool):
            raise _fault("must be a JSON schema", (*path, "json_schema"))
        options = {**self._schema_options}
        if value.get("strict") is False:
            options |= {"lenient": True, "coerce_one_of": True}
        whole = {**schema} if isinstance(schema, dict) else {"allOf": [schema]}
        return self._rule(f"%json {json.dumps({**whole, 'x-guidance': options})}")

    def _any_text(self, value: Mapping[str, Any], path: Path) -> str:
        """Return a text that does not contain any of the `excludes`."""
        if not value.get("excludes"):
            return _TEXT
        excluded = [
            re.escape(each) if isinstance(each, str) and each else "" for each in _list(value, "excludes", path)
        ]
        if "" in excluded:
            raise _fault("must be texts that are not empty", (*path, "excludes"))
        pattern = f"(.|\n)*({'|'.join(excluded)})(.|\n)*"
        return f"({_TEXT} & ~{_slashed(pattern)})"

    def _regex(self, value: Mapping[str, Any], path: Path) -> str:
        pattern = _text(value, "pattern", path)
        return self._rule(_slashed(pattern))

    def _sequence(self, value: Mapping[str, Any], path: Path) -> str:
        elements = _list(value, "elements", path)
        parts: list[str] = []
        index = 0
        while index < len(elements):
            here, after = (*path, "elements", index), elements[index + 1 : index + 2]
            if _object(elements[index], here).get("type") != "any_text" or not after:
                parts.append(self._format(elements[index], here))
                index += 1
            elif isinstance(after[0], dict) and after[0].get("type") == "const_string":
                end = self._const_string(after[0], (*path, "elements", index + 1))
                parts.append(self._rule(f"{self._any_text(elements[index], here)} {end}", "[lazy]"))
                index += 2
            else:
                raise _fault("any_text must be the last element, or be followed by a const_string", here)
        return self._rule(" ".join(parts))

    def _or(self, value: Mapping[str, Any], path: Path) -> str:
        elements = _list(value, "elements", path)
        return self._rule(
            " | ".join(self._format(each, (*path, "elements", index)) for index, each in enumerate(elements))
        )

    def _tag(self, value: Mapping[str, Any], path: Path, *, skip: str = "") -> str:
        """`skip`: the beginning of the tag that was matched already."""
        begin, end = _text(value, "begin", path).removeprefix(skip), self._literal(_text(value, "end", path))
        content, here = value.get("content"), (*path, "content")
        if _object(content, here).get("type") == "any_text" and end:
            body = self._rule(f"{self._any_text(_object(content, here), here)} {end}", "[lazy]")
        else:
            body = f"{self._format(content, here)} {end}"
        return self._rule(f"{self._literal(begin)} {body}")

    def _tags(self, value: Mapping[str, Any], path: Path) -> list[tuple[Mapping[str, Any], Path]]:
        tags = _list(value, "tags", path)
        return [(_object(each, (*path, "tags", index)), (*path, "tags", index)) for index, each in enumerate(tags)]

    def _triggered_tags(self, value: Mapping[str, Any], path: Path) -> str:
        tags, units, num_used = self._tags(value, path), list[str](), 0
        for index, trigger in enumerate(_list(value, "triggers", path)):
            if not isinstance(trigger, str) or not trigger:
                raise _fault("must be a text that is not empty", (*path, "triggers", index))
            own = [(tag, where) for tag, where in tags if _text(tag, "begin", where).startswith(trigger)]
            if not own:
                raise _fault("no tag begins with this trigger", (*path, "triggers", index))
            num_used += len(own)
            rest = self._rule(" | ".join(self._tag(tag, where, skip=trigger) for tag, where in own))
            literal = self._literal(trigger)
            if self._special is not None and self._special.fullmatch(trigger):
                units.append(self._rule(f"{_TEXT} {literal} {rest}"))
            else:
                units.append(self._rule(f"{self._rule(f'{_TEXT} {json.dumps(trigger)}', '[lazy]')} {rest}"))
        if num_used != len(tags):
            raise _fault("each tag must begin with exactly one of the triggers", (*path, "triggers"))
        unit = self._rule(" | ".join(units))
        if value.get("stop_after_first"):
            return unit if value.get("at_least_one") else self._rule(f"{unit} | {_TEXT}")
        return self._rule(f"{unit}{'+' if value.get('at_least_one') else '*'} {_TEXT}")

    def _tags_with_separator(self, value: Mapping[str, Any], path: Path) -> str:
        unit = self._rule(" | ".join(self._tag(tag, where) for tag, where in self._tags(value, path)))
        separator = self._literal(_text(value, "separator", path))
        more = "" if value.get("stop_after_first") else f" ({separator} {unit})*"
        return self._rule(f"{unit}{more}" if value.get("at_least_one") else f"({unit}{more})?")


def of_structures(tag: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tag in the older form, `structures` and `triggers`, as a format of type `triggered_tags`."""
    structures = _list(tag, "structures", ())
    tags = []
    for index, each in enumerate(structures):
        one = _object(each, ("structures", index))
        schema = one.get("schema")
        if not isinstance(schema, dict):
            raise _fault("must be a JSON schema", ("structures", index, "schema"))
        content = {"type": "json_schema", "json_schema": schema}
        tags.append({"type": "tag", "begin": one.get("begin"), "content": content, "end": one.get("end")})
    return {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}


def _slashed(pattern: str) -> str:
    """Return a pattern as a terminal of Lark. A line break or a slash would end it."""
    return "/" + re.sub(r"\\.|[/\n]", _escaped, f"(?:{pattern})", flags=re.DOTALL) + "/"


def _escaped(found: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(found[0], found[0])


def _object(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _fault("must be an object", path)
    return value


def _list(value: Mapping[str, Any], name: str, path: Path) -> list[Any]:
    found = value.get(name)
    if not isinstance(found, list) or not found:
        raise _fault("must be a list that is not empty", (*path, name))
    return found


def _text(value: Mapping[str, Any], name: str, path: Path) -> str:
    found = value.get(name)
    if not isinstance(found, str):
        raise _fault("must be a text", (*path, name))
    return found


def _fault(message: str, path: Path) -> InvalidConstraint:
    return InvalidConstraint(message, param=path_text(path))
