"""scripts/audit.py finds packages that are not pinned, not installed as pinned, or under a licence not in its list."""

from __future__ import annotations

from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import audit
import packages


class Package(metadata.Distribution):
    def __init__(self, version: str = "1.0", **fields: str | list[str]) -> None:
        self._message = Message()
        self._message["Version"] = version
        for name, values in fields.items():
            for value in [values] if isinstance(values, str) else values:
                self._message[name.replace("_", "-")] = value

    @property
    def metadata(self) -> Any:
        return self._message

    def read_text(self, filename: str) -> str | None:
        raise NotImplementedError(filename)

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError(path)


GOOD = Package(License_Expression="MIT")


def problems(**changes: Any) -> list[str]:
    inputs: dict[str, Any] = {
        "asked": {"a": Requirement("a>=1")},
        "pinned": {"a": Version("1.0"), "b": Version("1.0")},
        "hashed": {"a": Version("1.0"), "b": Version("1.0")},
        "installed": {"a": GOOD, "b": GOOD},
    }
    return audit.problems(**{**inputs, **changes})


def test_the_audit_accepts_pinned_hashed_and_allowed_packages() -> None:
    assert problems() == []
    assert problems(installed={"a": Package("1.0+cpu", License_Expression="MIT")}) == []  # another build


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pinned": {}}, "a is in pyproject.toml but not pinned"),
        ({"pinned": {"a": Version("0.9")}}, "not within pyproject.toml's a>=1"),
        ({"installed": {}}, "a is not installed"),
        ({"hashed": {"b": Version("1.0")}}, "a==1.0 has no hash"),
        ({"pinned": {"a": Version("1.0")}}, "b is an indirect dependency and not pinned"),
        ({"installed": {"a": Package("1.1", License_Expression="MIT")}}, "a 1.1 is installed, but 1.0 is pinned"),
        ({"installed": {"a": Package(License_Expression="AGPL-3.0")}}, "a has the licence 'AGPL-3.0'"),
        ({"installed": {"a": Package(License_Expression="MIT AND (GPL-3.0 OR MIT)")}}, "a has the licence 'GPL-3.0'"),
        ({"installed": {"a": Package(License="Ask my lawyer\nMIT")}}, "a has the licence 'Ask my lawyer'"),
        ({"installed": {"a": Package()}}, "a has the licence 'no licence'"),
        ({"installed": {"a": Package(Classifier=["License :: OSI Approved :: Secret"])}}, "a has the licence 'Secret'"),
    ],
)
def test_the_audit_names_each_kind_of_problem(changes: dict[str, Any], expected: str) -> None:
    assert any(expected in line for line in problems(**changes)), problems(**changes)


def test_the_audit_reads_the_files_of_this_repository(tmp_path: Path) -> None:
    asked, pinned, hashed = (
        packages.direct_requirements(),
        packages.pins(packages.CONSTRAINTS),
        packages.pins(packages.HASHES),
    )
    assert {"uvicorn", "mypy", "pytest", "torch"} <= asked.keys() <= pinned.keys()
    assert pinned.keys() - {"torch"} <= hashed.keys()
    lines = packages.HASHES.read_text(encoding="utf-8").splitlines()
    assert all("--hash=sha256:" in line for line in lines if not line.startswith("#"))
    file = tmp_path / "some.txt"
    file.write_text("# head\nA_b==1.0 --hash=sha256:0\n\nc==2 # why\n")
    assert packages.pins(file) == {"a-b": Version("1.0"), "c": Version("2")}
