"""Prints the size of each room, and fails if one is too large for a person to keep in mind.

Limits: 500 lines a file, everything counted; 3,500 lines of code in a core room and 2,000 in any other; and no file
with a vague name (utils.py). Docstrings, comments and
blank lines are not lines of code: they make a room easier to read, and must not be cut to stay within a limit.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

MAX_FILE_LINES = 500
CORE_ROOMS = {"kv", "router", "runner", "scheduler", "server", "engine", "testing"}  # testing: fakes of all others
MAX_CORE_ROOM_LINES, MAX_ROOM_LINES = 3_500, 2_000  # of code
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "data", "info"}


_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def num_code_lines(source: str) -> int:
    """Return the number of lines that hold a token other than a comment or a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node):
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return len(lines)


def problems_of(package: Path) -> tuple[Counter[str], list[str]]:
    """Return the lines of code of each room (folder or top-level file), and one line for each broken limit."""
    rooms: Counter[str] = Counter()
    problems = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        source = path.read_text(encoding="utf-8")
        num_lines = len(source.splitlines())
        rooms[relative.parts[0]] += num_code_lines(source)
        if num_lines > MAX_FILE_LINES:
            problems.append(f"{relative}: {num_lines} lines; at most {MAX_FILE_LINES}")
        if path.stem in VAGUE_NAMES:
            problems.append(f"{relative}: name it after its contents")
    for room, num_lines in rooms.items():
        limit = MAX_CORE_ROOM_LINES if room in CORE_ROOMS else MAX_ROOM_LINES
        if num_lines > limit:
            problems.append(f"{room}: {num_lines} lines of code; at most {limit}")
    return rooms, problems


def main() -> int:
    package = Path(__file__).resolve().parent.parent / "src" / "kvist"
    rooms, problems = problems_of(package)
    for room, num_lines in rooms.most_common():
        print(f"{num_lines:6}  {room}")
    print(f"{rooms.total():6}  lines of code in all")
    for problem in problems:
        print(f"too large or badly named: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
