"""Fake engines that are stopped after the test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import pytest

from kvist.channel import ChannelConfig
from kvist.testing.fake_engine import FakeEngine
from kvist.wire import EngineSpec


class StartEngine(Protocol):
    def __call__(
        self, *, spec: EngineSpec | None = None, bind: str = "tcp://127.0.0.1:0", config: ChannelConfig | None = None
    ) -> FakeEngine: ...


@pytest.fixture
def start_engine() -> Iterator[StartEngine]:
    engines: list[FakeEngine] = []

    def start(
        *, spec: EngineSpec | None = None, bind: str = "tcp://127.0.0.1:0", config: ChannelConfig | None = None
    ) -> FakeEngine:
        engines.append(FakeEngine(spec=spec, bind=bind, config=config).start())
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()
