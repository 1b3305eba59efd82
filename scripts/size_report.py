"""Says how large each room is, and fails when the package outgrows what a person can hold in their head.

Limits: 500 lines a file; 14,000 lines in all, not counting blank ones (the formatter decides on those); and no file
named after nothing in particular (utils.py).
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

MAX_FILE_LINES = 500
MAX_PACKAGE_LINES = 14_000
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "data", "info"}


def problems_of(package: Path) -> tuple[Counter[str], list[str]]:
    """Lines of each room (folder or top-level file), blank ones not counted, and what is over a limit."""
    rooms: Counter[str] = Counter()
    problems = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        lines = path.read_text(encoding="utf-8").splitlines()
        rooms[relative.parts[0]] += sum(bool(line.strip()) for line in lines)
        if len(lines) > MAX_FILE_LINES:
            problems.append(f"{relative}: {len(lines)} lines; at most {MAX_FILE_LINES}")
        if path.stem in VAGUE_NAMES:
            problems.append(f"{relative}: name it after what it holds")
    if rooms.total() > MAX_PACKAGE_LINES:
        problems.append(f"the package has {rooms.total()} lines that are not blank; at most {MAX_PACKAGE_LINES}")
    return rooms, problems


def main() -> int:
    package = Path(__file__).resolve().parent.parent / "src" / "kvist"
    rooms, problems = problems_of(package)
    for room, num_lines in rooms.most_common():
        print(f"{num_lines:6}  {room}")
    print(f"{rooms.total():6}  in all, of {MAX_PACKAGE_LINES} (lines that are not blank)")
    for problem in problems:
        print(f"too large or badly named: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
