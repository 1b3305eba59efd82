"""HTTP body → typed struct. Every way it can be wrong is a 400 that names the field, in OpenAI's vocabulary.

Nothing is ignored: a field we do not know is refused with the nearest one we do; a field of the API that we cannot
honour (typed `object`) is refused unless it has a value that asks for nothing.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import Generic, TypeVar

import msgspec

from kvist.errors import RequestError, UnsupportedField
from kvist.server.schemas import NEUTRAL

T = TypeVar("T", bound=msgspec.Struct)

_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(?P<name>.*?)`(?: - at `(?P<path>.*)`)?$", re.DOTALL)
_MAX_NAME_CHARS = 64  # a longer name resembles none of ours, and comparing takes time
_PATH = re.compile(r" - at `(?P<path>.*)`$", re.DOTALL)


class BodyDecoder(Generic[T]):
    """For one endpoint."""

    def __init__(self, struct: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(struct)
        self._known = _field_names(struct).difference(_unsupported(struct))

    def decode(self, body: bytes) -> T:
        if not body:
            raise RequestError("the request body is empty; it must be a JSON object")
        try:
            value = self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise self._invalid(str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(f"the request body is not valid JSON in UTF-8: {error}") from error
        refuse_unsupported(value)
        return value

    def _invalid(self, message: str) -> RequestError:
        unknown = _UNKNOWN_FIELD.match(message)
        if unknown is None:
            found = _PATH.search(message)
            if found is None and message.startswith("Expected"):  # of the body itself, which has no name
                return RequestError(f"the request body must be a JSON object: {message}")
            param = _param(found["path"]) if found else None
            return RequestError(f"{_PATH.sub('', message)}{f' at `{param}`' if param else ''}", param=param)
        path = _param(unknown["path"] or "$")
        name = f"{path}.{unknown['name']}" if path else unknown["name"]
        near = difflib.get_close_matches(unknown["name"][:_MAX_NAME_CHARS], sorted(self._known), n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return RequestError(f"unknown field `{name}`{hint}", param=name)


@cache
def _unsupported(struct: type[msgspec.Struct]) -> tuple[str, ...]:
    """The fields that we cannot honour (schemas.py)."""
    return tuple(field.name for field in msgspec.structs.fields(struct) if field.type is object)


def refuse_unsupported(value: msgspec.Struct, prefix: str = "") -> None:
    """Unless what is asked for is nothing; null always is."""
    for name in _unsupported(type(value)):
        asked = getattr(value, name)
        if asked is not None and asked not in NEUTRAL.get(name, ()):
            raise UnsupportedField(f"`{prefix}{name}` is not supported; leave it out", param=prefix + name)


def _param(path: str) -> str | None:
    """`$.messages[0].role` → `messages[0].role`; the body itself has no name."""
    return path.removeprefix("$").removeprefix(".") or None


def _field_names(struct: type[msgspec.Struct]) -> set[str]:
    """Names of its fields and of the structs inside them."""
    names: set[str] = set()
    pending: list[object] = [struct]
    while pending:
        kind = pending.pop()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            for one in msgspec.structs.fields(kind):
                names.add(one.encode_name)
                pending.append(one.type)
        else:
            pending.extend(getattr(kind, "__args__", ()))
    return names
