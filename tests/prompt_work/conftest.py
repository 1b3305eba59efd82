"""The application over a scripted dispatcher."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from kvist.testing.gateway_bench import GatewayBench, gateway_bench


@pytest.fixture
async def bench() -> AsyncIterator[GatewayBench]:
    made = gateway_bench()
    async with made.client:
        yield made
