"""The documentation names real things and links to real files."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import api_fields
import door_table
import metrics_page
from kvist import settings
from kvist.options import options_of

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def _resolve(name: str) -> object:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize(("page", "at_least"), [("follow-one-request.md", 75), ("performance.md", 10)])
def test_every_name_in_a_page_of_the_docs_exists(page: str, at_least: int) -> None:
    names = re.findall(r"`(kvist(?:\.\w+)+)`", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert len(names) > at_least
    for name in names:
        _resolve(name)


def test_a_missing_name_in_the_docs_is_found() -> None:
    with pytest.raises(AttributeError):
        _resolve("kvist.wire.NoSuchMessage")


def test_every_class_of_the_glossary_exists() -> None:
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)`", (ROOT / "docs/glossary.md").read_text())
    assert len(names) > 60
    for name in names:
        _resolve(f"kvist.{name}")


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/api.md",
        "docs/bench.md",
        "docs/cache.md",
        "docs/failure-modes.md",
        "docs/metrics.md",
        "docs/models.md",
        "docs/operations.md",
        "docs/performance.md",
        "docs/security.md",
    ],
)
def test_every_flag_in_the_docs_exists(page: str) -> None:
    options = [option for settings_class in settings._SETTINGS.values() for option in options_of(settings_class)]
    known = {"--help", "--help-all", "--version", *(short.flag for short in settings.SHORTHANDS)}
    known |= {flag for option in options for flag in option.flags}
    known |= {f"--no-{flag[2:]}" for option in options if option.is_switch for flag in option.flags}
    text = re.sub(r"`numactl[^`]*`|pip install [^\n]*", "", (ROOT / page).read_text(encoding="utf-8"))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)) <= known


def test_the_table_of_request_fields_matches_the_schemas() -> None:
    _, rest = (ROOT / "docs/api.md").read_text(encoding="utf-8").split(api_fields.BEGIN)
    assert rest.split(api_fields.END)[0] == api_fields.table(), "run: python scripts/api_fields.py"


def test_the_table_of_doors_matches_their_dicts() -> None:
    _, rest = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split(door_table.BEGIN)
    assert rest.split(door_table.END)[0] == door_table.table(), "run: python scripts/door_table.py"


def test_the_readme_names_every_backend_of_a_door_in_the_row_of_its_flag() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    doors = list(door_table.chosen_doors(settings.UpSettings))
    assert len(doors) >= 3
    for door in doors:
        flag, _own = door_table.flags_of(door)
        (row,) = [line for line in lines if line.startswith(f"| `{flag}`")]
        assert set(door.door) <= set(re.findall(r"`([\w-]+)`", row)), row


def exported_metrics() -> set[str]:
    return {metrics_page.exported_name(family) for _section, family in metrics_page.families()}


def test_the_tables_of_metrics_match_the_declarations() -> None:
    tables = metrics_page.tables_of((ROOT / "docs/metrics.md").read_text(encoding="utf-8"))
    assert tables == {section: metrics_page.table(section) for section in metrics_page.SECTIONS}, (
        "run: python scripts/metrics_page.py"
    )


def test_the_metrics_have_the_names_that_users_know() -> None:
    listed = (ROOT / "tests/server/metric_names.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(exported_metrics()) == listed


@pytest.mark.parametrize("page", ["failure-modes.md", "performance.md"])
def test_every_metric_in_the_docs_is_exported(page: str) -> None:
    named = re.findall(r"kvist:\w+", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert len(set(named)) > 5
    assert set(named) <= exported_metrics()


@functools.cache
def defined_in(path: Path) -> set[str]:
    """Return the names of the tests in a file: functions, and the names that state machines run under."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return {name for name in names if name.lower().startswith("test")}


@pytest.mark.parametrize(("page", "at_least"), [("failure-modes.md", 100), ("testing.md", 30)])
def test_every_test_named_in_the_docs_exists(page: str, at_least: int) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) >= at_least
    missing = [f"{path}::{name}" for path, name in named if name not in defined_in(ROOT / path)]
    assert missing == []


def test_every_row_of_the_failure_modes_is_complete_and_names_a_test() -> None:
    lines = (ROOT / "docs/failure-modes.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|") and not line.startswith(("| fault", "|---"))]
    assert len(rows) > 60
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5, row
        assert all(cells), row
        assert "::test" in cells[4].lower(), row


def test_the_map_of_rooms_names_every_room_and_every_file_beside_them() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = page.split("| room | contents |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    named = [name for row in rows for name in re.findall(r"`([\w./]+)`", row.split("|")[1])]
    found = [
        path.name + "/" * path.is_dir()
        for path in (ROOT / "src/kvist").iterdir()
        if path.suffix in ("", ".py") and not path.name.startswith("__")
    ]
    assert sorted(named) == sorted(found)


def test_the_map_links_every_decision_once_at_least() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\(adr/([\w-]+\.md)\)", page))
    assert linked == {path.name for path in (ROOT / "docs/adr").iterdir()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_of_the_docs_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
