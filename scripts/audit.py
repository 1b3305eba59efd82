"""Checks the installed packages, without a network: each is pinned, installed as pinned, and under a known licence.

    python scripts/audit.py

The licences come from the metadata of the packages. A person must read a new licence before it is added to the list:
Kvist is Apache-2.0, and a distributor of Kvist with its dependencies must be able to comply with all of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from packages import CONSTRAINTS, HASHES, direct_requirements, installed_closure, pins

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
        "3-clause bsd license",
        "bsd-3-clause",
        "bsl-1.0",
        "cc0-1.0",
        "cnri-python",
        "isc license",
        "isc license (iscl)",
        "mit",
        "mit license",
        "mozilla public license 2.0 (mpl 2.0)",  # applies to the package's own files, which Kvist does not change
        "mpl-2.0",
        "psf-2.0",
        "zlib",
    }
)
_ABOUT_LICENCES = frozenset({"dfsg approved", "osi approved"})  # classifiers without a licence
_OF_CUDA = re.compile(r"nvidia-.*|cuda-.*|triton")  # parts of torch's CUDA builds, under NVIDIA's terms; not shipped


def problems(
    *,
    asked: Mapping[str, Requirement],
    pinned: Mapping[str, Version],
    hashed: Mapping[str, Version],
    installed: Mapping[str, metadata.Distribution],
) -> list[str]:
    """Return one line for each problem."""
    found = []
    for name, requirement in asked.items():
        if name not in pinned:
            found.append(f"{name} is in pyproject.toml but not pinned: add {name}==VERSION to {CONSTRAINTS.name}")
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
            found.append(f"{name} is an indirect dependency and not pinned: add it to {CONSTRAINTS.name}")
        elif (
            wanted is not None and Version(distribution.version).public != wanted.public
        ):  # a local version is another build of the same code
            found.append(f"{name} {distribution.version} is installed, but {wanted} is pinned: make setup")
        found += [
            f"{name} has the licence {one!r}, which scripts/audit.py does not allow"
            for one in not_allowed(distribution)
        ]
    return found


def not_allowed(distribution: metadata.Distribution) -> list[str]:
    return [one for one in licences(distribution) or ["no licence"] if one.lower() not in ALLOWED]


def licences(distribution: metadata.Distribution) -> list[str]:
    """Return the licences of the SPDX expression, else of the classifiers, else the first line of the licence field."""
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
