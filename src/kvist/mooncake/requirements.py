"""The needs of Mooncake on this host: its package in the right release, libraries of the system, a network.

The library itself checks little: it starts with an unknown protocol, a device that does not exist, or the address of
another host, and fails later. `obstacle` finds these cases, and names the command or the flag that helps. The release
is pinned because the next one differs.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvist.errors import Unavailable

RELEASE = "0.3.13"
PROTOCOLS = ("tcp", "rdma")
INSTALL = "pip install 'kvist[mooncake]'"
_PACKAGES = ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine")
_SYSTEM_LIBRARIES = {  # that the wheel links to, over TCP too, and does not contain; by soname: Debian's package
    "libibverbs.so.1": "libibverbs1",
    "libnuma.so.1": "libnuma1",
    "libcurl.so.4": "libcurl4",
}
_DEVICES = Path("/sys/class/infiniband")
_LIMITS = {  # of the library, read from the environment when it is loaded
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "2",  # without progress a copy fails
    "MC_TCP_STATUS_TIMEOUT_SEC": "2",  # the same for the answer to a write
    "MC_RPC_TIMEOUT_MS": "2000",  # of one call of the master; 30 s otherwise
    "MC_STORE_CLIENT_SETUP_RETRIES": "3",  # a master that does not answer is waited for 20 times otherwise: 91 s
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The network of an engine: this host's address in it, and how bytes travel."""

    host: str
    protocol: str = "tcp"
    devices: tuple[str, ...] = ()  # of RDMA; empty: all of this host

    def __str__(self) -> str:
        over = f" on {', '.join(self.devices)}" if self.devices else ""
        return f"{self.host} over {self.protocol}{over}"


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A part of Kvist that uses Mooncake, and the flags by which it chooses the network; for messages."""

    title: str
    protocol_flag: str
    devices_flag: str
    host_flag: str


def obstacle(network: Network, user: User) -> str:
    """Return why Mooncake cannot run here, with the command or flag that helps; empty if it can."""
    return library_obstacle() or _network_obstacle(network, user)


def library_obstacle() -> str:
    """Return why Mooncake's library cannot be used, with the command that helps; empty if it can."""
    installed = installed_release()
    if installed is None:
        return f"Mooncake is not installed: {INSTALL}"
    if not f"{installed}.".startswith(f"{RELEASE}."):
        return f"Mooncake {installed} is installed, but Kvist needs {RELEASE}: {INSTALL}"
    missing = missing_packages()
    if missing:
        return f"Mooncake needs libraries of the system that are missing: apt-get install {' '.join(missing)}"
    try:
        load("mooncake.engine")
    except Unavailable as error:
        return error.message
    return ""


def installed_release() -> str | None:
    for package in _PACKAGES:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def missing_packages() -> list[str]:
    """Return Debian's packages of the system libraries that cannot be loaded."""
    return [package for soname, package in _SYSTEM_LIBRARIES.items() if not _can_load(soname)]


@cache
def load(module: str) -> Any:
    """Import a module of the library, `mooncake.engine` or `mooncake.store`, with our limits, which the library reads
    from the environment. Raises `Unavailable`."""
    os.environ.update(_LIMITS)
    os.environ.pop("MC_TCP_PROTO", None)  # 1 would turn the status frames off
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"the library of Mooncake cannot be loaded ({error}): {INSTALL}") from error


def _can_load(soname: str) -> bool:
    try:
        ctypes.CDLL(soname)
    except OSError:
        return False
    return True


def _network_obstacle(network: Network, user: User) -> str:
    if network.protocol not in PROTOCOLS:
        return f"{user.protocol_flag} {network.protocol} is not one of {', '.join(PROTOCOLS)}"
    if network.devices and network.protocol != "rdma":
        return f"{user.devices_flag} {','.join(network.devices)} needs RDMA: add {user.protocol_flag} rdma"
    if network.protocol == "rdma":
        found = sorted(path.name for path in _DEVICES.glob("*"))
        if not found:
            return f"this host has no RDMA device ({_DEVICES} has none): use {user.protocol_flag} tcp"
        for device in network.devices:
            if device not in found:
                return f"this host has no RDMA device {device}: choose of {', '.join(found)} with {user.devices_flag}"
        chosen = network.devices or found
        if not any(_is_up(device) for device in chosen):
            return f"no port of {', '.join(chosen)} is active (`rdma link` shows them): use {user.protocol_flag} tcp"
    if not _is_ours(network.host):
        return f"{network.host} is not an address of this host (`ip address` shows them): set {user.host_flag}"
    return ""


def _is_up(device: str) -> bool:
    """Return whether a port of an RDMA device is active. False also if the system does not say so."""
    states = []
    for path in (_DEVICES / device / "ports").glob("*/state"):
        with contextlib.suppress(OSError):
            states.append(path.read_text())  # "4: ACTIVE"
    return any("ACTIVE" in state for state in states)


def _is_ours(host: str) -> bool:
    """Return whether a socket of this host can have the address, or one of the addresses of the name."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError:
            continue
        return True
    return False
