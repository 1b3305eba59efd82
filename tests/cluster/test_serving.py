"""The listening socket of the HTTP server."""

from __future__ import annotations

import socket

import pytest

from kvist.cluster.serving import listen
from kvist.errors import ConfigError
from kvist.server.config import ServerConfig


@pytest.mark.parametrize(
    ("server", "warned"),
    [
        (ServerConfig(host="0.0.0.0", port=0), True),
        (ServerConfig(host="0.0.0.0", port=0, api_key=("k",)), False),
        (ServerConfig(host="127.0.0.1", port=0), False),
    ],
)
def test_an_open_address_without_an_api_key_is_logged_as_a_warning(
    server: ServerConfig, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with listen(server):
        assert any("--api-key" in record.message for record in caplog.records) is warned


def test_the_error_for_a_port_in_use_names_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}"), listen(ServerConfig(port=port)):
            pass
