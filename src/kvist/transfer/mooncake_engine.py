"""Mooncake's TransferEngine in this process: its options, the checks before it is loaded, and its calls.

A process has one engine, made at its first use (`mooncake_engine`), whose listening threads run until the process ends.
The library is an extra: `pip install 'kvist[mooncake]'`. Its release is checked, because the next one differs.

Its status frames make a write complete only when the bytes are in the peer's memory, and a receiver refuses addresses
outside its registered memory. Nothing else is relied on: a failed call may leave bytes under way
(memory/page_window.py).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvist.config import option
from kvist.errors import ConfigError, EngineError, Unavailable

RELEASE = "0.3.13"
_PACKAGES = ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine")
_INSTALL = "pip install 'kvist[mooncake]'"
_INSTALL_LIBRARIES = "apt install libibverbs1 librdmacm1 libnuma1 liburing2"
_DEVICES = Path("/sys/class/infiniband")
_SILENCE_S = 2  # without progress, or without the answer to a write: the write fails


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakeOptions:
    protocol: str = option("tcp", "network of the copies between hosts", choices=("tcp", "rdma"))
    device: str | None = option(None, "RDMA device, such as mlx5_0", unset="all of this host")
    host: str | None = option(None, "address of this host for the copies of peers", unset="that of the engine's socket")

    def __post_init__(self) -> None:
        if self.device is not None and self.protocol != "rdma":
            raise ConfigError(
                f"--transfer-device {self.device} needs RDMA: add --transfer-protocol rdma", param="transfer_device"
            )


def obstacle(options: MooncakeOptions) -> str:
    """Return why Mooncake cannot run here, with the command that helps; empty if it can."""
    installed = _installed_release()
    if installed is None:
        return f"the library of Mooncake is not installed: {_INSTALL}"
    if not f"{installed}.".startswith(f"{RELEASE}."):
        return f"Mooncake {installed} is installed, but Kvist needs {RELEASE}: {_INSTALL}"
    try:
        importlib.import_module("mooncake.engine")
    except ImportError as error:
        return f"the library of Mooncake cannot be loaded ({error}): {_INSTALL_LIBRARIES}"
    if options.protocol == "rdma":
        return _rdma_obstacle(options.device)
    return ""


def _installed_release() -> str | None:
    for package in _PACKAGES:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _rdma_obstacle(device: str | None) -> str:
    found = sorted(path.name for path in _DEVICES.glob("*"))
    if not found:
        return f"this host has no RDMA device ({_DEVICES} has none): use --transfer-protocol tcp"
    if device is not None and device not in found:
        return f"this host has no RDMA device {device}: choose one of {', '.join(found)} with --transfer-device"
    return ""


class MooncakeEngine:
    """The library's engine. Its calls release Python's lock. Thread-safe."""

    def __init__(self, options: MooncakeOptions, host: str) -> None:
        """Raises `ConfigError` if the library refuses `host` or the device."""
        self._engine = _load().TransferEngine()
        if self._engine.initialize(host, "P2PHANDSHAKE", options.protocol, options.device or ""):
            raise ConfigError(
                f"Mooncake cannot start with the address {host} over {options.protocol}: set --transfer-host to an "
                "address of this host",
                param="transfer_host",
            )
        self.options, self.host = options, host
        self.session = f"{_bracketed(host)}:{self._engine.get_rpc_port()}"

    def register(self, address: int, num_bytes: int) -> None:
        if self._engine.register_memory(address, num_bytes):
            raise EngineError(f"Mooncake cannot register {num_bytes} bytes; with RDMA, raise `ulimit -l`")

    def unregister(self, address: int) -> None:
        self._engine.unregister_memory(address)

    def write(self, session: str, ours: Sequence[int], theirs: Sequence[int], num_bytes: Sequence[int]) -> bool:
        """Copy pieces of our memory to a peer. True: all bytes are in the peer's memory. False: part of them may be
        there, and others may still arrive."""
        done: int = self._engine.batch_transfer_sync_write(session, list(ours), list(theirs), list(num_bytes))
        return done == 0

    def read(self, session: str, ours: int, theirs: int, num_bytes: int) -> bool:
        done: int = self._engine.transfer_sync_read(session, ours, theirs, num_bytes)
        return done == 0


_made: dict[None, MooncakeEngine] = {}
_making = threading.Lock()


def mooncake_engine(options: MooncakeOptions, host: str) -> MooncakeEngine:
    """Return the engine of this process. Raises `ConfigError` if it was made with another address or network."""
    with _making:
        engine = _made.get(None)
        if engine is None:
            engine = _made[None] = MooncakeEngine(options, host)
    if (engine.options, engine.host) != (options, host):
        raise ConfigError(f"Mooncake runs in this process at {engine.host} already, not at {host}")
    return engine


@cache
def _load() -> Any:
    """Import the library with our limits, which it reads from the environment."""
    os.environ["MC_TCP_STATUS_TIMEOUT_SEC"] = os.environ["MC_TCP_PROGRESS_TIMEOUT_SEC"] = str(_SILENCE_S)
    os.environ.pop("MC_TCP_PROTO", None)  # 1 would turn the status frames off
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    try:
        return importlib.import_module("mooncake.engine")
    except ImportError as error:
        raise Unavailable(f"the library of Mooncake cannot be loaded ({error}): {_INSTALL}") from error


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
