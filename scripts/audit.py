"""Checks what is installed, without a network: each package is pinned, installed as pinned, and under a good licence.

    python scripts/audit.py

Licences are what the packages say of themselves. A licence that is not listed here is looked at by a person before it
is added: Kvist is Apache-2.0, and whoever ships it with its dependencies must be able to keep to all of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import metadata

from packages import CONSTRAINTS, HASHES, direct_requirements, installed_closure, pins
from packaging.requirements import Requirement
from packaging.version import Version

ALLOWED = frozenset(
    {
        "0bsd",
        "apache",
        "apache 2.0",
        "apache 2.0 license",
        "apache software license",
        "apache-2.0",
        "apache-2.0 with llvm-exception",
        "bsd",
        "bsd 2-clause license",
        "bsd license",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsl-1.0",
        "cc0-1.0",
        "cnri-python",
        "isc license",
        "isc license (iscl)",
        "mit",
        "mit license",
        "mozilla public license 2.0 (mpl 2.0)",  # of its own files only, which Kvist does not change
        "mpl-2.0",
        "psf-2.0",
        "zlib",
    }
)
_ABOUT_LICENCES = frozenset({"dfsg approved", "osi approved"})  # classifiers that name none
_OF_CUDA = re.compile(r"nvidia-.*|cuda-.*|triton")  # come with torch's CUDA builds, under NVIDIA's terms; not shipped


def problems(
    *,
    asked: Mapping[str, Requirement],
    pinned: Mapping[str, Version],
    hashed: Mapping[str, Version],
    installed: Mapping[str, metadata.Distribution],
) -> list[str]:
    """One line for each thing that is not as it should be."""
    found = []
    for name, requirement in asked.items():
        if name not in pinned:
            found.append(f"{name} is in pyproject.toml and not pinned: add {name}==VERSION to {CONSTRAINTS.name}")
        elif not requirement.specifier.contains(pinned[name], prereleases=True):
            found.append(f"{name}=={pinned[name]} in {CONSTRAINTS.name} is not within pyproject.toml's {requirement}")
        if name not in installed:
            found.append(f"{name} is not installed: make setup")
    for name, version in pinned.items():
        if name != "torch" and hashed.get(name) != version:
            found.append(f"{name}=={version} has no hash in {HASHES.name}: python scripts/lock.py")
    for name, distribution in sorted(installed.items()):
        if _OF_CUDA.fullmatch(name):
            continue
        wanted = pinned.get(name)
        if wanted is None and name not in asked:
            found.append(f"{name} is installed because others need it, and not pinned: add it to {CONSTRAINTS.name}")
        elif (
            wanted is not None and Version(distribution.version).public != wanted.public
        ):  # a local version is another build of the same
            found.append(f"{name} {distribution.version} is installed and {wanted} is pinned: make setup")
        found += [
            f"{name} is under {one!r}, which scripts/audit.py does not allow" for one in not_allowed(distribution)
        ]
    return found


def not_allowed(distribution: metadata.Distribution) -> list[str]:
    return [one for one in licences(distribution) or ["no licence"] if one.lower() not in ALLOWED]


def licences(distribution: metadata.Distribution) -> list[str]:
    """The SPDX expression's, else the classifiers', else the first line of the licence field."""
    fields = distribution.metadata
    expression = "".join(fields.get_all("License-Expression") or [])
    if not expression:
        classes = [line.split(" :: ") for line in fields.get_all("Classifier") or []]
        named = [words[-1] for words in classes if words[0] == "License" and words[-1].lower() not in _ABOUT_LICENCES]
        if named:
            return named
        expression = "".join(fields.get_all("License") or []).partition("\n")[0]
    return [one.strip(" ()") for one in re.split(r" AND | OR ", expression) if one.strip(" ()")]


def main() -> int:
    asked = direct_requirements()
    installed = installed_closure(asked)
    found = problems(asked=asked, pinned=pins(CONSTRAINTS), hashed=pins(HASHES), installed=installed)
    for line in found:
        print(f"audit: {line}")
    print(f"{len(installed)} packages audited: {'as pinned, under allowed licences' if not found else 'see above'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
