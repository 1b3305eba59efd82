"""A deterministic server in this process for the tests of the language."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvist.execution.fake_server import FakeServer
from kvist.lang import Endpoint

MakeEndpoint = Callable[[FakeServer], Endpoint]


@pytest.fixture
def endpoint_for() -> Iterator[MakeEndpoint]:
    """Give endpoints for fake servers, and close them at the end."""
    made: list[Endpoint] = []

    def make(server: FakeServer) -> Endpoint:
        made.append(Endpoint(lambda: server, name="fake"))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def endpoint(server: FakeServer, endpoint_for: MakeEndpoint) -> Endpoint:
    return endpoint_for(server)
