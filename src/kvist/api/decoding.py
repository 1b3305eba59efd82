"""Decodes an HTTP body into a typed struct. Every fault of a body is a 400 that names the field.

No field is ignored silently: an unknown field is refused with the nearest known name, a field that would change the
answer and cannot be honoured is refused with an alternative, and a field without effect is named in the response header
`x-kvist-ignored` (fields.py has the classes).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Generic, TypeVar

import msgspec

from kvist.api.fields import Honoured, Refused, UnmetFieldFinder, classes_of
from kvist.api.invalid_text import invalid_text_path
from kvist.api.shape import check_shape
from kvist.errors import UNDECODABLE, RequestError, UnsupportedField

T = TypeVar("T", bound=msgspec.Struct)

_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(?P<name>.*?)`(?: - at `(?P<path>.*)`)?$", re.DOTALL)
IGNORED = b"x-kvist-ignored"
_MAX_NAME_CHARS = 64  # longer than any known name; comparing takes time
_MIN_LIKENESS = 0.7  # of a name that is proposed instead of an unknown one
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_PATH = re.compile(r" - at `(?P<path>.*)`$", re.DOTALL)


class BodyDecoder(Generic[T]):
    """Decodes the bodies of one endpoint."""

    def __init__(self, struct: type[T]) -> None:
        self._struct = struct
        self._decoder = msgspec.json.Decoder(struct)

    def decode(self, body: bytes) -> tuple[T, Sequence[tuple[bytes, bytes]]]:
        """Return the request, and the response header that names its fields without effect, if any."""
        if not body:
            raise RequestError("the request body is empty; it must be a JSON object")
        check_shape(body)
        try:
            value = self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise self._invalid(str(error), body) from error
        except RecursionError as error:
            raise RequestError("lists and objects of the request body are nested too deeply") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            param = invalid_text_path(body)
            where = f"`{param}` is not valid Unicode" if param else "the request body is not valid JSON in UTF-8"
            raise RequestError(f"{where}: {error}", param=param) from error
        ignored = dict.fromkeys(_without_effect(value, "", ""))
        return value, [(IGNORED, ", ".join(ignored).encode())] if ignored else []

    def _invalid(self, message: str, body: bytes) -> RequestError:
        unknown = _UNKNOWN_FIELD.match(message)
        if unknown is None:
            found = _PATH.search(message)
            if found is None and message.startswith("Expected"):  # about the body itself, which has no name
                return RequestError(f"the request body must be a JSON object: {message}")
            param = _param(found["path"]) if found else None
            return RequestError(f"{_PATH.sub('', message)}{f' at `{param}`' if param else ''}", param=param)
        path = _param(unknown["path"] or "$")
        name = f"{path}.{unknown['name']}" if path else unknown["name"]
        kind = _type_at(body, unknown["path"] or "$")
        of_type = "" if kind is None else f" of the type {kind[:_MAX_NAME_CHARS]!r}"
        return RequestError(f"unknown field `{name}`{of_type}{self._hint(unknown['name'])}", param=name)

    def _hint(self, name: str) -> str:
        known = _known_names(self._struct)
        near = difflib.get_close_matches(name[:_MAX_NAME_CHARS], list(known), n=1, cutoff=_MIN_LIKENESS)
        return f"; did you mean `{known[near[0]]}`?" if near else ""


def _without_effect(value: msgspec.Struct, where: str, kind: str) -> Iterator[str]:
    """Yield the paths, without indices, of the advisory fields that are set. Raise `UnsupportedField` for the first
    refused field, with the indices in its path."""
    checks = _field_checks(type(value))
    for name, cls in checks.unmet.find(value):
        if isinstance(cls, Refused):
            raise UnsupportedField(f"`{where}{name}` is not supported: {cls.instead}", param=where + name)
        yield kind + name
    for name in checks.inside:
        found = getattr(value, name)
        if isinstance(found, msgspec.Struct):
            yield from _without_effect(found, f"{where}{name}.", f"{kind}{name}.")
        elif isinstance(found, list):
            for index, one in enumerate(found):
                if isinstance(one, msgspec.Struct):
                    yield from _without_effect(one, f"{where}{name}[{index}].", f"{kind}{name}[].")


class _FieldChecks(msgspec.Struct, frozen=True):
    unmet: UnmetFieldFinder
    inside: Sequence[str]  # the fields that hold structs


@cache
def _field_checks(struct: type[msgspec.Struct]) -> _FieldChecks:
    inside = [field.name for field in msgspec.structs.fields(struct) if any(_structs_in(field.type))]
    return _FieldChecks(UnmetFieldFinder(struct), inside)


def _type_at(body: bytes, path: str) -> str | None:
    """Return the `type` of the object at `path` of a body: of an unknown type, all fields may be unknown."""
    try:
        value: object = msgspec.json.decode(body)
    except UNDECODABLE:
        return None
    for name, index in _STEP.findall(path):
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list):
            value = value[int(index)]
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else None


def _param(path: str) -> str | None:
    """Convert `$.messages[0].role` to `messages[0].role`; the body itself has no name."""
    return path.removeprefix("$").removeprefix(".") or None


@cache
def _known_names(struct: type[msgspec.Struct]) -> Mapping[str, str]:
    """Map field names of `struct` and of the structs inside it to their paths. Where several fields have one name, an
    honoured field wins, then the outermost one."""
    names: dict[str, str] = {}
    others: dict[str, str] = {}
    pending = [(struct, "")]
    while pending:
        kind, where = pending.pop(0)
        classes = classes_of(kind)
        for field in msgspec.structs.fields(kind):
            name = field.encode_name
            honoured = isinstance(classes.get(field.name, Honoured("")), Honoured)
            (names if honoured else others).setdefault(name, where + name)
            pending.extend((inner, f"{where}{name}.") for inner in _structs_in(field.type))
    return others | names


def _structs_in(kind: object) -> Iterator[type[msgspec.Struct]]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
    for inner in getattr(kind, "__args__", ()):
        yield from _structs_in(inner)
