"""The URLs of workers: one spelling for each, and which of them a gateway may dial when others name them.

The operator's own flags and `--discovery` may name any address. A URL that arrives over HTTP (`POST /workers`, an
announcement) must be `http://HOST:PORT` or `https://HOST:PORT` and nothing else, and its host must be the sender's own
address, an address of a private network, loopback if the sender is on this machine, or one of `--allowed-worker-hosts`.
A host name is not resolved for this check, since its answer could change afterwards: names must be allowed by name.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from kvist.channel import bracketed
from kvist.channel.security import split_tcp_endpoint
from kvist.errors import ConfigError, Forbidden, RequestError

MAX_URL_CHARS = 512
_DEFAULT_PORTS = {"http": 80, "https": 443}
# RFC 1918, RFC 6598 and RFC 4193. Link-local addresses are not among them: clouds serve their metadata there.
_PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def normal_url(url: str) -> str:
    """Return the one spelling of a worker's URL: with scheme and port, host in lower case, no slash at the end. Without
    a scheme a port is required, or any word would pass.

    Raises `ConfigError` if the URL is not an HTTP address."""
    full = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(full)
        port = parts.port
        valid = parts.scheme in _DEFAULT_PORTS and bool(parts.hostname) and port != 0 and len(full) <= MAX_URL_CHARS
        valid = valid and ("://" in url or port is not None) and not any(letter <= " " for letter in url)
    except ValueError:
        valid, parts, port = False, urlsplit(""), None
    if not valid:
        raise ConfigError(f"{url[:MAX_URL_CHARS]!r} is not a worker URL; use http://HOST:PORT")
    user, at, _ = parts.netloc.rpartition("@")
    host = bracketed(parts.hostname or "")
    netloc = f"{user}{at}{host}" + ("" if port is None else f":{port}")
    return full.replace(f"{parts.scheme}://{parts.netloc}", f"{parts.scheme}://{netloc}", 1)


class HostRule:
    """Which hosts may be named over HTTP."""

    def __init__(self, allowed: Sequence[str]) -> None:
        """`allowed`: addresses, networks (10.0.0.0/8), names, or suffixes of names (*.workers.example). Raises
        `ConfigError`."""
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        self._names: set[str] = set()
        self._suffixes: list[str] = []
        for each in allowed:
            self._allow(each.strip().lower())

    def check(self, url: str, sender: str) -> str:
        """Return the URL in its one spelling. Raises `RequestError` for one that is not plain, and `Forbidden` for a
        host that must not be dialled. `sender`: address of the client that names the URL."""
        try:
            normal = normal_url(url)
        except ConfigError as error:
            raise RequestError(error.message, param="url") from error
        parts = urlsplit(normal)
        if parts.path or parts.query or parts.fragment or "@" in parts.netloc or "?" in url or "#" in url:
            raise RequestError(
                "`url` must be http://HOST:PORT alone, without user, path, query or fragment", param="url"
            )
        host = parts.hostname or ""
        if not self.admits(host, sender):
            raise Forbidden(
                f"this gateway does not connect to {host[:64]!r} when {sender} names it: name the worker by an address "
                f"of its own or of a private network, or start the gateway with --allowed-worker-hosts {host[:64]}"
            )
        return normal

    def admits_engine(self, endpoint: str, url: str) -> bool:
        """Return whether the worker at `url`, which somebody has named over HTTP, may send the router to this engine:
        to its own host, or to one that it could have named."""
        own = urlsplit(url).hostname or ""
        address = split_tcp_endpoint(endpoint)
        if address is None:  # a file of this machine
            return self.admits("127.0.0.1", own)
        return address[0].lower() == own or self.admits(address[0], own)

    def admits(self, host: str, sender: str) -> bool:
        host = host.lower()
        if host in self._names or any(host.endswith(suffix) for suffix in self._suffixes):
            return True
        address, own = _address(host), _address(sender)
        if host == "localhost":
            return own is None or own.is_loopback
        if address is None:
            return False
        if any(address in network for network in self._networks):
            return True
        if address.is_loopback:
            return own is None or own.is_loopback  # None: over a local socket
        return address == own or any(address in network for network in _PRIVATE)

    def _allow(self, entry: str) -> None:
        if entry.startswith("*.") and len(entry) > len("*."):
            self._suffixes.append(entry[1:])
            return
        try:
            self._networks.append(ipaddress.ip_network(entry, strict=False))
        except ValueError:
            if not entry or "/" in entry or "*" in entry or ":" in entry:
                raise ConfigError(
                    f"--allowed-worker-hosts: {entry!r} is not a host; use an address, a network such as 10.0.0.0/8, a "
                    "name, or *.SUFFIX",
                    param="allowed_worker_hosts",
                ) from None
            self._names.add(entry)


def _address(host: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
