"""The stores of the storage tier: pages outside the engine's memory, shared by engines and kept across restarts.

backend.py has the interface; each store has its own file and its own options. `STORES` is the only list of stores."""

from __future__ import annotations

from kvist.door import Door, backend_with
from kvist.errors import ConfigError
from kvist.store.backend import PageStore, StoreContext
from kvist.store.file_options import FileStoreOptions
from kvist.store.mooncake_options import MooncakeStoreOptions


def _file(options: FileStoreOptions, context: StoreContext) -> PageStore:
    try:
        from kvist.store.file import FileStore
    except ImportError as error:
        raise ConfigError(f"the file store needs a POSIX system ({error}): remove --hicache-storage-backend") from error

    return FileStore(options.folder, context, capacity_bytes=options.capacity_bytes)


def _mooncake(options: MooncakeStoreOptions, context: StoreContext) -> PageStore:
    from kvist.store.mooncake import MooncakeStore

    return MooncakeStore(options, context)


STORES: Door[[StoreContext], PageStore] = {
    "file": backend_with(FileStoreOptions, _file, text="a folder that workers share and that survives restarts"),
    "mooncake": backend_with(
        MooncakeStoreOptions, _mooncake, text="the memory of Mooncake stores on any hosts, which workers share"
    ),
}
