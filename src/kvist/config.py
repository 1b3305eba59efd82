"""How a room declares its settings: a frozen dataclass whose fields carry their own help.

Each room owns one small config beside its user; `settings.py` composes them and builds `--help` from the metadata.

    @dataclass(frozen=True, slots=True, kw_only=True)
    class SchedulerConfig:
        page_size: int = option(16, "tokens in one KV page", unit="tokens", choices=(16, 32, 64))
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class OptionHelp:
    """What the command line says of a field."""

    text: str
    unit: str = ""
    choices: tuple[Any, ...] = ()
    flag: str | None = None  # default: the field's name with dashes
    aliases: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    secret: bool = False  # never printed or logged
    unset: str = ""  # the word for None, in --help and as a value


def check_api_key(key: str) -> None:
    """Raises `ValueError` for a key that no client could send in a header; the key is not quoted."""
    if not key or not all("!" <= letter <= "~" for letter in key):
        raise ValueError(
            "--api-key is empty or has characters that cannot be sent in an HTTP header: "
            "use ASCII letters, digits and punctuation, without spaces"
        )


def option(
    default: T,
    text: str,
    *,
    unit: str = "",
    choices: tuple[T, ...] = (),
    flag: str | None = None,
    aliases: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    secret: bool = False,
    unset: str = "",
) -> T:
    """A dataclass field with help. Flags keep SGLang's names where they mean the same."""
    note = OptionHelp(
        text,
        unit=unit,
        choices=choices,
        flag=flag,
        aliases=aliases,
        minimum=minimum,
        maximum=maximum,
        secret=secret,
        unset=unset,
    )
    field: T = dataclasses.field(default=default, repr=not secret, metadata={"option": note})
    return field
