"""The arguments of a program and the fields of requests that carry them: errors name what the program has written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kvist.errors import KvistError

# A name, and a path of it: `continuations[3]`, `response_format.json_schema.schema.properties`
_NAMED = re.compile(r"`([a-z_][a-z0-9_.]*)((?:\[\d+\])*)`")


@contextmanager
def named(arguments: Mapping[str, str]) -> Iterator[None]:
    """Let the errors of the body name arguments of the program in place of fields. `arguments` has that of each field,
    and of the fields inside of it. A message that names no such field gets the argument in front."""
    try:
        yield
    except KvistError as error:
        _rename(error, arguments)
        raise


def _rename(error: KvistError, arguments: Mapping[str, str]) -> None:
    def argument_of(field: str) -> str | None:
        while field and field not in arguments:
            field = field.rpartition(".")[0]
        return arguments.get(field)

    def renamed(found: re.Match[str]) -> str:
        argument = argument_of(found[1])
        return found[0] if argument is None else f"`{argument}{found[2]}`"

    message = _NAMED.sub(renamed, error.message)
    argument = argument_of((error.param or "").partition("[")[0])
    if argument is not None:
        error.param = argument
        if f"`{argument}" not in message:
            message = f"`{argument}`: {message}"
    error.message, error.args = message, (message,)
