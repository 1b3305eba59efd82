"""Writes `--help` from the options of a settings class: default, unit, choices and text, grouped by room."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from kvist.flags import Option, Shorthand, options_of

_PLACEHOLDERS = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


def help_text(settings_class: type, *, usage: str, summary: str, shorthands: Sequence[Shorthand] = ()) -> str:
    """The whole page. One option a paragraph: its flags, then its text, its limits, its default, its variable."""
    width = min(110, shutil.get_terminal_size().columns)
    options = options_of(settings_class)
    lines = [f"usage: {usage}", "", *textwrap.wrap(summary, width), ""]
    for group in dict.fromkeys(option.group for option in options):
        lines.append(f"{group}:")
        for option in options:
            if option.group == group:
                lines += _paragraph(option, width)
                for short in shorthands:
                    if short.key == option.key:
                        lines += _entry(short.flag + ("" if short.value else " TEXT"), short.text, width)
        lines.append("")
    lines += textwrap.wrap(
        "Every option can also be set by the environment variable KVIST_<NAME> (--page-size is KVIST_PAGE_SIZE) or by "
        "its name with underscores in the TOML file named by --config. Flags win over the environment, the "
        "environment over the file.",
        width,
    )
    return "\n".join(lines)


def _paragraph(option: Option, width: int) -> list[str]:
    head = ", ".join(option.flags)
    if not option.is_switch:
        unit = option.help.unit.upper().replace(" ", "_")
        placeholder = unit or _PLACEHOLDERS[option.kinds[-1]]
        if option.choices:
            placeholder = "{" + ",".join(str(choice) for choice in option.choices) + "}"
        head += f" {placeholder}" + (" ..." if option.many else "")
    notes = [f"default: {_shown(option)}"]
    if option.help.unit:
        notes.append(f"unit: {option.help.unit}")
    if option.help.minimum is not None or option.help.maximum is not None:
        low = "" if option.help.minimum is None else f"{option.help.minimum:g}"
        high = "" if option.help.maximum is None else f"{option.help.maximum:.0f}"
        notes.append(f"allowed: {low}..{high}")
    return _entry(head, f"{option.help.text} ({'; '.join(notes)})", width)


def _entry(head: str, text: str, width: int) -> list[str]:
    return [f"  {head}", *textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)]


def _shown(option: Option) -> str:
    value = option.default
    if option.help.secret:
        return "not set"
    if value is None or value in ((), ""):
        return option.help.unset or "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return " ".join(str(item) for item in value)
    return str(value)
