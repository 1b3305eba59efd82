"""docs/observability.md names every field that a client can read."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from kvist.dashboard import snapshot
from kvist.flight import records

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "observability.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", [snapshot, records], ids=lambda module: module.__name__)
def test_every_field_is_named(module: ModuleType) -> None:
    named = set(re.findall(r"`([a-z0-9_]+)`", PAGE))
    types = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, msgspec.Struct)]
    fields = {field for one in types for field in one.__struct_fields__}
    assert len(fields) > 10
    assert fields - named == set()
