"""The stores of the storage tier: pages outside the engine's memory, shared by engines and kept across restarts.

backend.py defines the interface; each store has its own file, and `open_store` chooses a store by name."""

from __future__ import annotations

from collections.abc import Callable

from kvist.errors import ConfigError
from kvist.store.backend import PageStore, StoreSpec


def _memory(spec: StoreSpec) -> PageStore:
    from kvist.store.memory import MemoryStore

    return MemoryStore(spec)


def _file(spec: StoreSpec) -> PageStore:
    try:
        from kvist.store.file import FileStore
    except ImportError as error:
        raise ConfigError(f"the file store needs a POSIX system ({error}): remove --hicache-storage-backend") from error

    return FileStore(spec)


_STORES: dict[str, Callable[[StoreSpec], PageStore]] = {"memory": _memory, "file": _file}


def open_store(name: str, spec: StoreSpec) -> PageStore:
    """Open the store called `name`. Raises `ConfigError` for an unknown name and an invalid spec, `StoreError` if the
    store cannot be reached or written."""
    if name not in _STORES:
        raise ConfigError(f"unknown storage tier {name!r}: use one of {', '.join(_STORES)}")
    if spec.capacity_bytes < spec.page_bytes:
        raise ConfigError(
            f"a storage tier of {spec.capacity_bytes} bytes is smaller than one page of {spec.page_bytes} bytes: raise "
            "its size"
        )
    return _STORES[name](spec)
