"""Makes `fake_engine` importable by the router tests (tests are not a package), and closes the engines they start."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine


@pytest.fixture
def start_engine() -> Iterator[Callable[..., FakeEngine]]:
    engines: list[FakeEngine] = []

    def start(**arguments: object) -> FakeEngine:
        engine = FakeEngine(**arguments).start()  # type: ignore[arg-type]
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.stop()
