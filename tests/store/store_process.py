"""A process that puts pages into a file store, round after round, until it is killed or its rounds are done.
test_file_store.py starts the process, and imports its constants.

    python store_process.py FOLDER CAPACITY_BYTES FIRST_KEY LAST_KEY NUM_ROUNDS

Prints one line per round: how many pages were stored.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from kvist.clock import Clock
from kvist.kv.keys import page_digests
from kvist.store.backend import StoreContext
from kvist.store.file import FileStore

PAGE_BYTES = 200_000  # several kernel pages: a write can be cut short
FILE_BYTES = PAGE_BYTES + 4096
KEYS = page_digests(range(256), 1, "processes")


def page_of(key: bytes) -> memoryview:
    return memoryview(np.random.default_rng(list(key)).bytes(PAGE_BYTES))


def open_files(
    folder: Path, capacity_bytes: int, *, namespace: str = "processes", clock: Clock | None = None
) -> FileStore:
    context = StoreContext(namespace=namespace, page_bytes=PAGE_BYTES)
    return FileStore(folder, context, capacity_bytes=capacity_bytes, clock=clock)


def main() -> None:
    folder, capacity_bytes, first, last, num_rounds = Path(sys.argv[1]), *map(int, sys.argv[2:])
    store = open_files(folder, capacity_bytes)
    pages = {key: page_of(key) for key in KEYS[first:last]}  # made before, so that a kill mostly hits a write
    for _ in range(num_rounds):
        print(sum(store.put([key], [page]) for key, page in pages.items()), flush=True)


if __name__ == "__main__":
    main()
