"""The storage tier: pages outside the engine's memory, shared by engines and kept across restarts. The door is
backend.py; one file a store, chosen by name here."""

from __future__ import annotations

from collections.abc import Callable

from kvist.errors import ConfigError
from kvist.kv.store.backend import PageStore, StoreSpec


def _memory(spec: StoreSpec) -> PageStore:
    from kvist.kv.store.memory import MemoryStore

    return MemoryStore(spec)


def _file(spec: StoreSpec) -> PageStore:
    try:
        from kvist.kv.store.file import FileStore
    except ImportError as error:
        raise ConfigError(f"the file store needs a POSIX system ({error}): do without a storage tier") from error

    return FileStore(spec)


_STORES: dict[str, Callable[[StoreSpec], PageStore]] = {"memory": _memory, "file": _file}


def open_store(name: str, spec: StoreSpec) -> PageStore:
    """Raises `ConfigError` for a name that is none and for a spec that cannot be, `StoreError` when the store cannot be
    reached or may not be written."""
    if name not in _STORES:
        raise ConfigError(f"storage tier {name!r}: known are {', '.join(_STORES)}")
    if spec.capacity_bytes < spec.page_bytes:
        raise ConfigError(
            f"a storage tier of {spec.capacity_bytes} bytes holds not one page of {spec.page_bytes}: give it more"
        )
    return _STORES[name](spec)
