"""The listening socket of the HTTP server."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from errno import EADDRINUSE

from kvist.errors import ConfigError


@contextlib.contextmanager
def bound_socket(host: str, port: int, *, flag: str = "port") -> Iterator[socket.socket]:
    """Yield a bound socket that does not listen yet. Raises `ConfigError`, which names the flag of the port, when the
    address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart must not wait for old connections
        try:
            listener.bind((host, port))
        except OSError as error:
            remedy = "; choose another port, or stop the server that uses this one" if error.errno == EADDRINUSE else ""
            raise ConfigError(
                f"cannot listen on --host {host} --{flag} {port}: {error.strerror}{remedy}",
                param=flag.replace("-", "_"),
            ) from error
        yield listener
