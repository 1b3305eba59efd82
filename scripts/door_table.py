"""Writes the table of doors into docs/architecture.md, from the doors' dicts.

    python scripts/door_table.py

tests/test_docs.py fails if the page has another table.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvist import settings
from kvist.door import Backend, DoorOptions
from kvist.options import options_of

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
BEGIN, END = "<!-- doors: made by scripts/door_table.py -->\n", "<!-- end of doors -->\n"

AnyDoor = Mapping[str, Backend[Any, Any]]


def chosen_doors(settings_class: type) -> Iterator[DoorOptions]:
    """Yield the doors whose backend is chosen by an option of these settings."""
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        door, hint = field.metadata.get("door"), hints[field.name]
        if isinstance(door, DoorOptions):
            yield door
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from chosen_doors(hint)


def flags_of(door: DoorOptions) -> tuple[str, dict[str, list[str]]]:
    """Return the flag that chooses a backend, and the flags of each backend's own options."""
    known = {option.key: option for option in options_of(settings.UpSettings)}
    own: dict[str, list[str]] = {name: [] for name in door.door}
    for option in known.values():
        if option.owners is not None and option.owners.chosen_by == door.chosen_by:
            for name in option.owners.names:
                own[name].append(option.flags[0])
    return known[door.chosen_by].flags[0], own


def table() -> str:
    lines = ["| door | backend | | its options |\n", "|---|---|---|---|\n"]
    for door in chosen_doors(settings.UpSettings):
        flag, own = flags_of(door)
        lines += _rows(f"{door.title}, `{flag}`", door.door, own)
    return "".join(lines)


def _rows(title: str, door: AnyDoor, own: Mapping[str, list[str]]) -> list[str]:
    return [
        f"| {title} | `{name}` | {row.text} | {' '.join(f'`{flag}`' for flag in own.get(name, ()))} |\n"
        for name, row in door.items()
    ]


def main() -> None:
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(head + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
