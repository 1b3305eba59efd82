"""Lists the packages of Kvist: direct requirements, pinned versions, and installed packages with their requirements.

Shared by audit.py, lock.py and lock_images.py. Run them with the Python that has these packages.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
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
    """Return, by name, every dependency of pyproject.toml that this platform needs, extras included."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {name: one for name, one in _named(lines) if name != "kvist"}


def pins(path: Path) -> dict[str, Version]:
    """Return the versions in a file of NAME==VERSION lines, with or without hashes."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.partition("#")[0].split()
        if words and not words[0].startswith("-"):
            name, _, version = words[0].partition("==")
            found[canonicalize_name(name)] = Version(version)
    return {str(name): version for name, version in found.items()}


def installed_closure(roots: Iterable[str]) -> dict[str, metadata.Distribution]:
    """Return the installed packages among `roots` and all their requirements, direct or indirect."""
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


def hashed_lines(requirements: Iterable[str], *options: str) -> list[str]:
    """Return a line NAME==VERSION --hash=... for each package that pip would install, sorted by name; asks the package
    index."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, report_path = Path(folder, "wanted.txt"), Path(folder, "report.json")
        wanted.write_text("".join(f"{line}\n" for line in requirements), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", *options]
        subprocess.run([*pip, "--report", report_path, "-r", wanted], check=True)
        report = json.loads(report_path.read_text(encoding="utf-8"))
    lines = []
    for one in report["install"]:
        digest = one["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{one['metadata']['name']}=={one['metadata']['version']} --hash=sha256:{digest}\n")
    return sorted(lines, key=str.lower)


def _named(lines: Iterable[str]) -> Iterator[tuple[str, Requirement]]:
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield str(canonicalize_name(requirement.name)), requirement
