"""Declares settings: frozen dataclasses whose fields carry their own help.

Each room owns a small config; settings.py composes them, and flag_help.py writes `--help` from them.

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
    """Metadata of an option for the command line and its help."""

    text: str
    unit: str = ""
    choices: tuple[Any, ...] = ()
    flag: str | None = None  # default: the field's name with dashes
    aliases: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    secret: bool = False  # never printed or logged
    unset: str = ""  # name of the value None, in --help and on the command line
    several: bool = False  # a text: one of `choices`, or several with commas between them


def check_api_key(key: str) -> None:
    """Raise `ValueError` for a key that no client could send in an HTTP header. The message does not quote the key."""
    if not key or not all("!" <= letter <= "~" for letter in key):
        raise ValueError(
            "--api-key is empty or contains characters that an HTTP header cannot carry: "
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
    several: bool = False,
) -> T:
    """Declare a dataclass field with help. Flags have SGLang's names where the meaning is the same."""
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
        several=several,
    )
    field: T = dataclasses.field(default=default, repr=not secret, metadata={"option": note})
    return field
