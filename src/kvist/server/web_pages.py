"""Protects the server from web pages that the user has not allowed.

A web page can make its visitor's browser send requests to loopback, where no API key is required: with a form, with an
image, or under a host name of its own that resolves to 127.0.0.1 (DNS rebinding). The Content-Type, Origin and Host
headers identify such requests. --allowed-origins names the pages that may use the server.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.types import Scope

from kvist.errors import Forbidden, RequestError, UnsupportedMediaType
from kvist.http.asgi import header
from kvist.server.config import ServerConfig

_METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})


class OriginGuard:
    def __init__(self, config: ServerConfig) -> None:
        self._origins = frozenset(config.allowed_origins)
        self._hosts = {config.host.lower(), *(_host_of(origin) for origin in config.allowed_origins)}
        # A page does not know the API key; off loopback, the host names of this server are unknown.
        self._is_strict = not config.api_key and is_local(config.host) and "*" not in self._origins

    def check(self, scope: Scope) -> None:
        """Raise `Forbidden` for a page that is not allowed, `UnsupportedMediaType` for a body that is not JSON."""
        if self._is_strict:
            self._check_host(header(scope, b"host"))
            self._check_origin(header(scope, b"origin"))
        if scope["method"] in _METHODS_WITH_BODY:
            _check_json(header(scope, b"content-type"))

    def _check_host(self, given: bytes | None) -> None:
        host = _host_of("//" + _text(given)) if given is not None else ""
        if given is not None and not is_local(host) and host not in self._hosts:
            raise Forbidden(
                f"Host {host!r} is refused: this server listens on loopback without an API key, and accepts only "
                f"localhost as Host. Start the server with --api-key, or with --allowed-origins http://{host}"
            )

    def _check_origin(self, given: bytes | None) -> None:
        if given is None:
            return
        origin = _text(given)
        if origin not in self._origins and not is_local(_host_of(origin)):
            raise Forbidden(
                f"web pages of {origin!r} may not use this server; to allow them, start the server with "
                f"--allowed-origins {origin}"
            )


def check_host_header(scope: Scope) -> None:
    """Raise `RequestError` unless the request has exactly one Host header, which HTTP/1.0 may omit."""
    num_hosts = sum(name == b"host" for name, _ in scope["headers"])
    if num_hosts > 1 or (num_hosts == 0 and scope["http_version"] == "1.1"):
        raise RequestError(f"the request has {num_hosts or 'no'} Host headers; HTTP/1.1 requires exactly one")


def is_local(host: str) -> bool:
    """Return whether the name or address always means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def _check_json(given: bytes | None) -> None:
    """Raise `UnsupportedMediaType` unless the type is JSON: browsers send other types cross-origin without a CORS
    preflight."""
    if given is None:
        return
    kind = _text(given).partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedMediaType(
            f"Content-Type is {kind[:64]!r}; send the body as JSON with the header 'Content-Type: application/json'"
        )


def _host_of(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _text(value: bytes) -> str:
    return value.decode("latin-1")
