"""Makes `fake_server` importable by this room's tests (there are no test packages)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fake_server


@pytest.fixture
def server() -> Iterator[fake_server.FakeServer]:
    with fake_server.running() as running:
        yield running
