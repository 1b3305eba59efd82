"""A process that stores pages in a Mooncake pool until it is killed. test_mooncake_faults.py starts it.

    python -m tests.store.mooncake_writer HOST:PORT NAMESPACE

Prints a line before the first put.
"""

from __future__ import annotations

import sys

import numpy as np

from kvist.kv.keys import page_digests
from kvist.store.backend import StoreContext
from kvist.store.mooncake import MooncakeStore
from kvist.store.mooncake_options import MooncakeStoreOptions

PAGE_BYTES = 1 << 18
KEYS = page_digests(range(4096), 1, "mooncake")


def page_of(key: bytes) -> memoryview:
    return memoryview(np.random.default_rng(list(key)).bytes(PAGE_BYTES))


def open_store(master: str, namespace: str, **options: float | str) -> MooncakeStore:
    chosen = MooncakeStoreOptions(mooncake_master_addr=master, **options)  # type: ignore[arg-type]
    return MooncakeStore(chosen, StoreContext(namespace=namespace, page_bytes=PAGE_BYTES))


def main() -> None:
    store = open_store(sys.argv[1], sys.argv[2])
    pages = [page_of(key) for key in KEYS[:64]]
    print("writing", flush=True)
    for first in range(0, len(pages), 4):
        store.put(KEYS[first : first + 4], pages[first : first + 4])


if __name__ == "__main__":
    main()
