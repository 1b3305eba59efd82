"""Parts of structural tags, as `grammar/structural_tag.py` and xgrammar read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Tag = dict[str, object]

ANY_TEXT: Tag = {"type": "any_text"}
NOTHING: Tag = {"type": "const_string", "value": ""}


def const(text: str) -> Tag:
    return {"type": "const_string", "value": text}


def any_text(excludes: Sequence[str]) -> Tag:
    """Return any text without the given ones."""
    return ANY_TEXT | {"excludes": list(excludes)} if excludes else ANY_TEXT


def regex(pattern: str) -> Tag:
    return {"type": "regex", "pattern": pattern}


def tag(begin: str, content: Tag, end: str) -> Tag:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def json_schema(schema: Mapping[str, object], *, strict: bool) -> Tag:
    """`strict` False: parts of the schema that cannot be enforced are ignored."""
    return {"type": "json_schema", "json_schema": dict(schema), "strict": strict}


def sequence(parts: Sequence[Tag]) -> Tag:
    """Return the parts one after another, without empty ones and without sequences inside of sequences."""
    flat: list[Tag] = []
    for part in parts:
        inner = part.get("elements") if part["type"] == "sequence" else None
        flat += inner if isinstance(inner, list) else [part]
    shown = [part for part in flat if part != NOTHING]
    return shown[0] if len(shown) == 1 else {"type": "sequence", "elements": shown} if shown else NOTHING


def one_of(parts: Sequence[Tag]) -> Tag:
    return parts[0] if len(parts) == 1 else {"type": "or", "elements": list(parts)}
