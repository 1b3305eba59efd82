"""What Kvist's packages are: those it asks for, those these ask for in turn, and what is installed of them.

Shared by audit.py and lock.py, which run with the Python that has them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
HASHES = ROOT / "constraints-hashes.txt"


def direct_requirements(pyproject: Path = ROOT / "pyproject.toml") -> dict[str, Requirement]:
    """By name: every dependency of pyproject.toml, those of its extras included, that this platform needs."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {name: one for name, one in _named(lines) if name != "kvist"}


def pins(path: Path) -> dict[str, Version]:
    """The versions of a file with NAME==VERSION lines, hashes or not."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.partition("#")[0].split()
        if words and not words[0].startswith("-"):
            name, _, version = words[0].partition("==")
            found[canonicalize_name(name)] = Version(version)
    return {str(name): version for name, version in found.items()}


def installed_closure(roots: Iterable[str]) -> dict[str, metadata.Distribution]:
    """The installed ones of these packages and of all that they ask for."""
    found: dict[str, metadata.Distribution] = {}
    pending = list(roots)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        pending += [needed for needed, _ in _named(found[name].requires or [])]
    return found


def _named(lines: Iterable[str]) -> Iterator[tuple[str, Requirement]]:
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield str(canonicalize_name(requirement.name)), requirement
