"""Finds the text of a JSON body that is not valid Unicode: bytes that are not UTF-8, or half of a surrogate pair.

The decoder of requests names only a position of such a text. The body is decoded again, by the standard library, which
keeps such characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

_MAX_PATH_CHARS = 256


def invalid_text_path(body: bytes) -> str | None:
    """Return the path of the first such text among the values of the body, for example `messages[0].content`; of the
    object, if it is a name. None if there is none, the body is not JSON, or the path is too long to be read."""
    try:
        value: object = json.loads(body.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    stack: list[tuple[str, Iterator[tuple[str, object]]]] = [("", iter([("", value)]))]
    while stack:
        path, rest = stack[-1]
        step, value = next(rest, (None, None))
        if step is None:
            stack.pop()
        elif not _is_valid(step):
            return _readable(path)
        elif isinstance(value, str) and not _is_valid(value):
            return _readable(path + step)
        elif isinstance(value, dict):
            stack.append((path + step, ((f".{name}", each) for name, each in value.items())))
        elif isinstance(value, list):
            stack.append((path + step, ((f"[{index}]", each) for index, each in enumerate(value))))
    return None


def _is_valid(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _readable(path: str) -> str | None:
    return path.removeprefix(".") or None if len(path) <= _MAX_PATH_CHARS else None
