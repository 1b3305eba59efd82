"""Refuses the fields that an object of its type does not have, and two values of one field: ignoring one of them would
lose what the client has written."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from kvist.errors import RequestError

_NEUTRAL: tuple[object, ...] = (None, "", [], {}, False)


def check_kind(value: msgspec.Struct, kind: str, fields: Mapping[str, Collection[str]], where: str) -> None:
    """Raise `RequestError` if `value`, the object at `where`, has a field of another type. `fields`: of each type, the
    fields that not every type has; a type that is not in it is not checked here."""
    own = fields.get(kind)
    if own is None:
        return
    for name in dict.fromkeys(name for names in fields.values() for name in names):
        if name not in own and getattr(value, name) not in _NEUTRAL:
            param = f"{where}.{name}"
            raise RequestError(f"`{param}` is not a field of the type {kind!r}: omit it", param=param)


def check_equal(value: msgspec.Struct, first: str, second: str, inside: str = "") -> None:
    """Raise `RequestError` if two names of one field have different values."""
    if getattr(value, first) != getattr(value, second) and None not in (getattr(value, first), getattr(value, second)):
        raise RequestError(f"`{inside}{first}` and `{inside}{second}` differ; set only one", param=inside + second)
