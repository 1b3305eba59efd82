"""Values inside calls: where a JSON or Python value ends, and the JSON of a value that was written as text."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence

from kvist.tools.cursor import HELD_CHARS, Cursor, MalformedCallError, Waiting

_MAX_DEPTH = 256
_JSON_QUOTES, PYTHON_QUOTES = '"', "\"'"
_CLOSING = {"{": "}", "[": "]", "(": ")"}
_OUTSIDE = {_JSON_QUOTES: re.compile(r'["{}\[\]<`]'), PYTHON_QUOTES: re.compile(r"[\"'{}\[\]()]")}
_INSIDE = {quote: re.compile(rf"[{quote}\\]") for quote in PYTHON_QUOTES}
_SCALAR_END = re.compile(r"[\s,}\]]")
_KEY = re.compile(r"[^\W\d]\w*")
_ARGUMENT_MARK = re.compile(r"[\"'{}\[\](),]")
# JSON's names outside of strings, and whole strings, which stay unchanged
_JSON_NAMES = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|\b(?:true|false|null)\b", re.DOTALL)
_MAX_SCHEMA_DEPTH = 8
_ANY_TYPE = frozenset({"string"})  # of a schema without types: text, as everywhere
_TYPE_NAMES: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    type(None): "null",
}
_LITERALS = {"true": True, "false": False, "none": None, "null": None}


class BracketScanner:
    """Finds the end of a bracketed value or string that arrives in pieces. Only brackets and quotes are checked, and
    that no mark of a model's format (`<`, a code block's end, or one of `breaks`) stands where JSON has none: the value
    is then cut."""

    def __init__(self, quotes: str = _JSON_QUOTES, breaks: Sequence[str] = ()) -> None:
        self._quotes = quotes
        self._breaks = breaks  # marks that begin with a bracket
        self._open: list[str] = []  # the closing brackets still to come
        self._quote = ""  # of the string that is open
        self._escapes = False  # the next character follows a backslash
        self.done = False
        self.broken = False  # a bracket closes nothing, a mark follows, or brackets are nested too deeply

    def advance(self, text: str, at: int) -> int:
        """Return the end of the value, the index of the bracket that breaks it, or the length of the text. `text[at]`
        follows the last scanned character. A bracket at which one of `breaks` may begin is not scanned before more text
        decides."""
        while at < len(text):
            if self._escapes:
                self._escapes, at = False, at + 1
                continue
            found = (_INSIDE[self._quote] if self._quote else _OUTSIDE[self._quotes]).search(text, at)
            if found is None:
                return len(text)
            if self._breaks and not self._quote:
                self.broken = any(text.startswith(each, found.start()) for each in self._breaks)
                if not self.broken and any(each.startswith(text[found.start() :]) for each in self._breaks):
                    return found.start()
            if not self.broken:
                self._see(found[0])
            if self.broken:
                return found.start()
            at = found.end()
            if not self._quote and not self._open:
                self.done = True
                break
        return at

    def _see(self, mark: str) -> None:
        if self._quote:
            self._escapes = mark == "\\"
            self._quote = self._quote if self._escapes else ""
        elif mark in self._quotes:
            self._quote = mark
        elif mark in _CLOSING:
            self._open.append(_CLOSING[mark])
            self.broken = len(self._open) > _MAX_DEPTH
        else:
            self.broken = not self._open or self._open.pop() != mark


def bracketed(cursor: Cursor, quotes: str = _JSON_QUOTES) -> Waiting[str]:
    """Read a value that begins with a bracket or a quote, up to `HELD_CHARS`, and return it."""
    first, scanner = cursor.at, BracketScanner(quotes)
    limit = first + HELD_CHARS
    while True:
        cursor.at = scanner.advance(cursor.text[:limit], cursor.at)
        if scanner.done:
            return cursor.text[first : cursor.at]
        if scanner.broken or cursor.at >= limit or cursor.ended:
            raise MalformedCallError
        yield


def json_value(cursor: Cursor) -> Waiting[str]:
    """Read any JSON value, up to `HELD_CHARS`, and return its text."""
    opening = yield from cursor.char()
    if opening in ("{", "[", '"'):
        return (yield from bracketed(cursor))
    first = cursor.at
    while True:
        found = _SCALAR_END.search(cursor.text, cursor.at, first + 64)  # longer than any number that a model writes
        cursor.at = min(len(cursor.text), first + 64) if found is None else found.start()
        if found is not None:
            break
        if cursor.ended or cursor.at == first + 64:
            raise MalformedCallError
        yield
    return cursor.text[first : cursor.at]


def json_string(cursor: Cursor) -> Waiting[str]:
    """Read a JSON string and return its content."""
    if (yield from cursor.char()) != '"':
        raise MalformedCallError
    return content_of((yield from bracketed(cursor)))


def content_of(text: str) -> str:
    """Return the content of a JSON string."""
    try:
        found = json.loads(text, strict=False)
        found.encode()
    except (ValueError, AttributeError) as error:
        raise MalformedCallError from error
    return str(found)


def escaped(text: str) -> str:
    """Return text as it is inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def typed(text: str, types: frozenset[str]) -> str:
    """Return the JSON of a parameter's text. `types` are the JSON types that the tool's schema allows."""
    bare = text.strip()
    if "null" in types and bare in ("null", "None"):
        return "null"
    if "string" in types or not types:
        return json.dumps(text, ensure_ascii=False)
    if is_json(bare):
        return bare
    if bare.lower() in _LITERALS and len(bare) <= 5:
        return json.dumps(_LITERALS[bare.lower()])
    return json.dumps(text, ensure_ascii=False)


def is_json(text: str) -> bool:
    """Return whether the text is JSON. Numbers may have any size."""
    try:
        json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def python_call(text: str) -> tuple[str, str]:
    """Return the name and the JSON arguments of `name(key=value, ...)`. Values are Python literals or JSON. Raises
    `MalformedCallError`."""
    name, _, rest = text.partition("(")
    pairs: dict[str, str] = {}
    for argument in _split_arguments(rest[:-1]):
        key, mark, value = argument.partition("=")
        if not mark or not _KEY.fullmatch(key.strip()) or key.strip() in pairs:
            raise MalformedCallError
        pairs[key.strip()] = _literal(value.strip())
    return name.strip(), "{" + ", ".join(
        f"{json.dumps(key, ensure_ascii=False)}: {one}" for key, one in pairs.items()
    ) + "}"


def _split_arguments(text: str) -> Iterator[str]:
    """Yield the arguments between the commas of the outermost level. A comma after the last one is allowed."""
    start, at = 0, 0
    while (found := _ARGUMENT_MARK.search(text, at)) is not None:
        at = found.start()
        if found[0] == ",":
            yield text[start:at]
            start = at = at + 1
            continue
        scanner = BracketScanner(PYTHON_QUOTES)
        at = scanner.advance(text, at)
        if not scanner.done:
            raise MalformedCallError
    if text[start:].strip():
        yield text[start:]


def _literal(text: str) -> str:
    """Return the JSON of a value."""
    if is_json(text):
        return text
    try:
        return _dumped(ast.literal_eval(_JSON_NAMES.sub(_python_name, text)))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise MalformedCallError from error


def _python_name(found: re.Match[str]) -> str:
    return {"true": "True", "false": "False", "null": "None"}.get(found[0], found[0])


def _dumped(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    has_lone_surrogates = any("\ud800" <= char <= "\udfff" for char in text)
    return json.dumps(value) if has_lone_surrogates else text


def types_of(schema: object, root: Mapping[str, object] | None = None) -> frozenset[str]:
    """Return the JSON types that a property's schema allows; empty when it names none. `root` has the definitions that
    the schema may refer to."""
    return _types_of(schema, root or {}, _MAX_SCHEMA_DEPTH)


def _types_of(schema: object, root: Mapping[str, object], depth: int) -> frozenset[str]:
    known = resolved(schema, root)
    if depth == 0:
        return frozenset()
    named = known.get("type")
    found = {named} if isinstance(named, str) else set(_texts(named))
    if not found:
        values = [known["const"]] if "const" in known else known.get("enum")
        found = {_TYPE_NAMES.get(type(one), "object") for one in values} if isinstance(values, list) else set()
    for key in ("anyOf", "oneOf"):
        options = known.get(key)
        for option in options if isinstance(options, list) and not found else ():
            found.update(_types_of(option, root, depth - 1) or _ANY_TYPE)
    parts = known.get("allOf")
    for part in parts if isinstance(parts, list) else ():
        found = found or set(_types_of(part, root, depth - 1))
    return frozenset(found)


def resolved(schema: object, root: Mapping[str, object]) -> Mapping[str, object]:
    """Return the schema with the definition that it refers to; empty for a schema that demands nothing."""
    known: dict[str, object] = {}
    for _ in range(_MAX_SCHEMA_DEPTH):
        if not isinstance(schema, Mapping):
            break
        known = {**schema, **known}
        reference = known.pop("$ref", None)
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        schema = root
        for step in reference[2:].split("/"):
            key = step.replace("~1", "/").replace("~0", "~")
            schema = schema.get(key) if isinstance(schema, Mapping) else None
    return known


def _texts(value: object) -> Sequence[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else ()
