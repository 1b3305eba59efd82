"""Writes `--help` and `--help-all` from the options of a settings class: default, unit, choices and text, by group."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvist.flags import Shorthand
from kvist.options import Option, options_of

_PLACEHOLDERS = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
_MAX_WIDTH, _FLAG_COLUMN = 110, 30
_TITLES = {  # of groups by field; groups with one title are shown together
    "alone": "Workers to start",
    "channel": "Messages between processes",
    "endpoint": "Role and socket of the engine",
    "operated": "Running server",
    "switch": "New role",
    "file": "Process",
    "host_tier": "Host tier of the cache",
    "instance": "HTTP server",
    "links": "Connections to workers",
    "load": "Load",
    "log": "Process",
    "name": "Model",
    "pair": "Workers to start",
    "parent": "Process",
    "routing": "Routing",
    "runner": "Engine",
    "runtime": "Engine",
    "scheduler": "Scheduler",
    "server": "HTTP server",
    "start": "Workers to start",
    "storage": "Storage tier of the cache",
    "target": "Server under test",
    "tls": "HTTP server",
    "tokenizer": "Model",
    "urls": "Workers",
    "watch": "Engine",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HelpPage:
    """Text of a help page besides its options. `only` selects the short page: these options, a line or two each."""

    usage: str
    summary: str
    shorthands: Sequence[Shorthand] = ()
    only: Collection[str] | None = None  # keys of options
    bold: bool = False  # print flags and titles in bold


def help_text(settings_class: type, page: HelpPage) -> str:
    width = min(_MAX_WIDTH, shutil.get_terminal_size().columns)
    options = [option for option in options_of(settings_class) if page.only is None or option.key in page.only]
    lines = [f"usage: {page.usage}", "", *textwrap.wrap(page.summary, width), ""]
    for title in dict.fromkeys(_title(option) for option in options):
        lines.append(_bold(title + ":", page))
        for option in options:
            if _title(option) == title:
                lines += _short(option, width, page) if page.only is not None else _full(option, width, page)
        lines.append("")
    if page.only is not None:
        lines.append("--help-all shows all options with units, limits and aliases.")
    lines += textwrap.wrap(
        "Every option can also be set with the environment variable KVIST_<NAME> (--page-size is KVIST_PAGE_SIZE), or "
        "with its name in underscores in the TOML file given by --config. A flag overrides the environment, and the "
        "environment overrides the file.",
        width,
    )
    return "\n".join(lines)


def _title(option: Option) -> str:
    return _TITLES.get(option.group, option.group[0].upper() + option.group[1:])


def _bold(text: str, page: HelpPage) -> str:
    return f"\x1b[1m{text}\x1b[0m" if page.bold else text


def _short(option: Option, width: int, page: HelpPage) -> list[str]:
    head = option.flags[0] + _placeholder(option)
    text = _with_notes(option.help.text, _default(option))
    indent = " " * _FLAG_COLUMN
    lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    if len(head) + 4 <= _FLAG_COLUMN:
        lines[0] = f"  {_bold(head, page)}{' ' * (_FLAG_COLUMN - len(head) - 2)}{lines[0].strip()}"
        return lines
    return [f"  {_bold(head, page)}", *lines]


def _full(option: Option, width: int, page: HelpPage) -> list[str]:
    notes = _default(option)
    if option.help.unit:
        notes.append(f"unit: {option.help.unit}")
    if option.help.minimum is not None or option.help.maximum is not None:
        low = "" if option.help.minimum is None else f"{option.help.minimum:g}"
        high = "" if option.help.maximum is None else f"{option.help.maximum:.0f}"
        notes.append(f"allowed: {low}..{high}")
    head = ", ".join(option.flags) + _placeholder(option)
    lines = _entry(head, _with_notes(option.help.text, notes), width, page)
    for short in page.shorthands:
        if short.key == option.key:
            lines += _entry(short.flag + ("" if short.value else " TEXT"), short.text, width, page)
    return lines


def _placeholder(option: Option) -> str:
    if option.is_switch:
        return ""
    if option.choices:
        word = "{" + ",".join(str(choice) for choice in option.choices) + "}" + (",..." if option.help.several else "")
    else:
        word = option.help.unit.upper().replace(" ", "_") or _PLACEHOLDERS[option.kinds[-1]]
    return f" {word}" + (" ..." if option.many else "")


def _entry(head: str, text: str, width: int, page: HelpPage) -> list[str]:
    indent = " " * 8
    return [f"  {_bold(head, page)}", *textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)]


def _with_notes(text: str, notes: list[str]) -> str:
    return f"{text} ({'; '.join(notes)})" if notes else text


def _default(option: Option) -> list[str]:
    """Return the note on the default value; empty for an unset option, whose text describes the default behaviour."""
    shown = _shown(option)
    return [f"default: {shown}"] if shown else []


def _shown(option: Option) -> str:
    value = option.default
    if option.help.secret:
        return ""
    if value is None or value in ((), ""):
        return option.help.unset
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return " ".join(str(item) for item in value)
    return str(value)
