"""The images: their packages are those that Kvist is tested with, all with hashes, and they fit the manifests.

`scripts/try_image.sh` builds the CPU image and lets it answer a request.
"""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from kvist.deploy.pods import USER_ID
from lock_images import EXTRAS, WITHOUT_DEPENDENCIES
from packages import CONSTRAINTS, pins

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/images"
KINDS = ("cpu", "cuda")
_OF_CUDA = re.compile(r"nvidia-.*|cuda-.*|triton")
_HASHED = re.compile(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}")


def dockerfile(kind: str) -> str:
    return (FOLDER / f"{kind}.Dockerfile").read_text(encoding="utf-8")


def packages_of(kind: str) -> dict[str, Version]:
    return pins(FOLDER / f"requirements-{kind}.txt")


@pytest.mark.parametrize("kind", KINDS)
def test_every_package_of_an_image_is_pinned_with_its_hash_as_the_tests_pin_it(kind: str) -> None:
    lines = (FOLDER / f"requirements-{kind}.txt").read_text(encoding="utf-8").splitlines()
    assert all(_HASHED.fullmatch(line) for line in lines if not line.startswith("#"))
    pinned = pins(CONSTRAINTS)
    for name, version in packages_of(kind).items():
        assert _OF_CUDA.fullmatch(name) or version.public == pinned[name].public, "run: python scripts/lock_images.py"


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_has_every_package_that_kvist_needs(kind: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    needed = {canonicalize_name(Requirement(line).name) for line in lines}
    assert {*needed, *WITHOUT_DEPENDENCIES} <= set(packages_of(kind)), "run: python scripts/lock_images.py"


def test_the_images_differ_in_torch_alone() -> None:
    cpu, cuda = (packages_of(kind) for kind in KINDS)
    assert cpu.pop("torch").local == "cpu"
    assert cuda.pop("torch").local is None
    assert {name: version for name, version in cuda.items() if not _OF_CUDA.fullmatch(name)} == cpu


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_runs_as_the_user_of_the_manifests_and_reports_its_health(kind: str) -> None:
    text = dockerfile(kind)
    assert f"\nUSER {USER_ID}:{USER_ID}\n" in text
    assert '\nENTRYPOINT ["kvist"]\n' in text
    assert "\nHEALTHCHECK " in text
    assert "/health'" in text


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_of_an_image_has_what_the_image_copies(kind: str) -> None:
    copied = re.search(r"^COPY (?!--)(.*) /tmp/$", dockerfile(kind), re.MULTILINE)
    assert copied is not None
    allowed = [
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"
    ]
    for path in copied[1].replace("*", "0.1.0-py3-none-any").split():
        assert any(fnmatch(path, pattern) for pattern in allowed), path
