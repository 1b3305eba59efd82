"""Reads the walks of docs/adding.md, and follows them in a copy of the repository.

A block of code that the reader has to write stands below a paragraph that names its file first and ends with a colon:

    `src/kvist/router/policies/power_of_d.py`, new:      then a block of the file's language: the whole file
    `src/kvist/router/policies/__init__.py`:             then a `diff` block: its hunks are separated by "@@"

The lines of a hunk without its "+" lines occur exactly once in the file.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding.md"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"`([\w./]+\.\w+)`(, new)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block of code of the page. `is_new`: the block is the whole file, else it is a list of changes."""

    path: str
    is_new: bool
    text: str

    def apply(self, root: Path) -> None:
        path = root / self.path
        if self.is_new:
            assert not path.exists(), f"{self.path} exists already: docs/adding.md must not call it new"
            path.write_text(self.text, encoding="utf-8")
            return
        source = path.read_text(encoding="utf-8")
        for hunk in self.text.split("@@\n"):
            source = _changed(self.path, source, hunk.splitlines())
        path.write_text(source, encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """One chapter of the page."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def source_files(self) -> tuple[str, ...]:
        return tuple(block.path for block in self.blocks if block.path.startswith("src/"))


def _changed(path: str, source: str, hunk: Sequence[str]) -> str:
    before = "".join(line[1:] + "\n" for line in hunk if not line.startswith("+"))
    after = "".join(line[1:] + "\n" for line in hunk if not line.startswith("-"))
    assert before != after, f"{path}: a hunk of docs/adding.md changes nothing"
    count = ("\n" + source).count("\n" + before)
    assert count == 1, f"{path} has these lines {count} times: bring the hunk of docs/adding.md up to date\n{before}"
    return ("\n" + source).replace("\n" + before, "\n" + after)[1:]


def read_walks(text: str) -> list[Walk]:
    """Return the chapters that have blocks of code."""
    chapters = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    walks = [
        Walk(title=title, blocks=tuple(_blocks(chapter)))
        for title, chapter in zip(chapters[::2], chapters[1::2], strict=True)
    ]
    return [walk for walk in walks if walk.blocks]


def _blocks(chapter: str) -> Iterator[Block]:
    for fence in _FENCE.finditer(chapter):
        language, text = fence.groups()
        if language == "console":  # commands to try
            continue
        *_, paragraph = chapter[: fence.start()].rstrip().split("\n\n")
        named = _FILE.search(paragraph) if paragraph.endswith(":") else None
        assert named is not None, f"a block of docs/adding.md has no file above it:\n{text}"
        is_new = named[2] is not None
        assert is_new == (language != "diff"), f"{named[1]}: a new file is no diff, and a change of a file is one"
        yield Block(path=named[1], is_new=is_new, text=text)


def copy_repository(to: Path) -> None:
    """Copy the parts of this repository that the walks change or that their tests read."""
    ignore = shutil.ignore_patterns("*.pyc.*", "*.egg-info", ".hypothesis")
    for folder in ("src", "tests", "docs", "scripts", "bench", "deploy", "examples"):
        shutil.copytree(ROOT / folder, to / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        shutil.copy2(ROOT / name, to)
