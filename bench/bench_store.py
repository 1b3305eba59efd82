"""How fast does a store write and read pages, compared with plain files of the same size in the same folder, or with
Mooncake's own client on the same pool?

    python bench/bench_store.py [FOLDER ...] [--json FILE]
    python bench/bench_store.py --mooncake [--json FILE]

Without folders: shared memory and the temporary folder. Store and plain files take turns, so that a noisy machine slows
both. Prints the median of the rounds in GB/s, and the ratio of the two. The first round is not counted: it creates the
folders, which is slow on ext4 and happens once in a store's life. Files are read back while they are in the kernel's
page cache. With `--mooncake` a pool of three stores on loopback takes the place of the folders; Mooncake's client puts
and gets objects of one piece without a header, in batches as large as the store's. A look-up finds none of its pages: a
request waits that long when the pool is empty. `--json` writes {commit, hardware, settings, rows}, one row a round.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from json_report import write_report
from kvist.kv.keys import page_digests
from kvist.mooncake.client import PoolClient, PoolSettings
from kvist.mooncake.engine import open_engine
from kvist.store.backend import HostMemory, PageStore, StoreContext
from kvist.store.file import FileStore
from kvist.store.mooncake import MooncakeStore
from kvist.store.mooncake_options import STORES_USER, MooncakeStoreOptions
from kvist.testing.mooncake_pool import MooncakePool

Row = tuple[str, str, float]  # folder, case, GB/s
PAIRS = {"put": "plain write", "put, evicting": "plain write", "get": "plain read"}
POOL_BATCH = 16  # pages in one call: a fetch of the engine (kv/tiers/storage.py); it stores up to 128 in one


def aligned_pages(num_pages: int, page_bytes: int) -> list[memoryview]:
    """Return pages laid out as in a pool: one mapping, every page touched."""
    pool = np.frombuffer(mmap.mmap(-1, num_pages * page_bytes), np.uint8).reshape(num_pages, page_bytes)
    pool[:] = np.random.default_rng(0).integers(0, 256, page_bytes, np.uint8)
    return [row.data for row in pool]


def rounds_in(folder: Path, settings: argparse.Namespace) -> Iterator[Row]:
    num_pages, page_bytes = settings.num_pages, settings.page_bytes
    pages, into = aligned_pages(num_pages, page_bytes), aligned_pages(num_pages, page_bytes)
    keys = page_digests(range(2 * num_pages), 1, "bench")
    capacity_bytes = num_pages * (page_bytes + 4096)
    threads = ThreadPoolExecutor(settings.num_threads)

    def timed(case: str, work: Callable[[int, int], object]) -> Row:
        """`work` of a share [first, last) in each thread."""
        bounds = [num_pages * index // settings.num_threads for index in range(settings.num_threads + 1)]
        start_s = time.perf_counter()
        list(threads.map(work, bounds, bounds[1:]))
        return str(folder), case, num_pages * page_bytes / 1e9 / (time.perf_counter() - start_s)

    def plain(index: int) -> str:
        return f"{folder}/plain/{index % 256:02x}/{index}"

    def write_plain(first: int, last: int) -> None:
        for index in range(first, last):
            fd = os.open(plain(index), os.O_WRONLY | os.O_CREAT)
            assert os.write(fd, pages[index]) == page_bytes
            os.close(fd)

    def read_plain(first: int, last: int) -> None:
        for index in range(first, last):
            fd = os.open(plain(index), os.O_RDONLY)
            assert os.readv(fd, [into[index]]) == page_bytes
            os.close(fd)

    def copy(first: int, last: int) -> None:
        for index in range(first, last):
            into[index][:] = pages[index]

    context = StoreContext(namespace="bench", page_bytes=page_bytes)
    for index in range(256):
        os.makedirs(f"{folder}/plain/{index:02x}")
    for round_index in range(settings.num_rounds + 1):
        store = FileStore(folder / "store", context, capacity_bytes=capacity_bytes)

        def put(first: int, last: int, store: PageStore = store) -> None:
            assert store.put(keys[first:last], pages[first:last]) == last - first

        def get(first: int, last: int, store: PageStore = store) -> None:
            assert store.get(keys[first:last], into[first:last]) == last - first

        def put_more(first: int, last: int, store: PageStore = store) -> None:
            assert store.put(keys[num_pages:][first:last], pages[first:last]) == last - first

        rows = [
            timed("memory copy", copy),
            timed("plain write", write_plain),
            timed("put", put),
            timed("plain read", read_plain),
            timed("get", get),
            timed("put, evicting", put_more),
        ]
        if round_index > 0:
            yield from rows
        store.close()
        for path in folder.rglob("*"):
            if path.is_file():
                path.unlink()
    shutil.rmtree(folder)


def rounds_in_pool(settings: argparse.Namespace) -> Iterator[Row]:
    num_pages, page_bytes = settings.num_pages, settings.page_bytes
    pool = np.frombuffer(mmap.mmap(-1, 2 * num_pages * page_bytes), np.uint8).reshape(-1, page_bytes)
    pool[:] = np.random.default_rng(0).integers(0, 256, page_bytes, np.uint8)
    pages = [row.data for row in pool]
    addresses = [row.ctypes.data for row in pool]
    into, addresses_into = pages[num_pages:], addresses[num_pages:]
    memory = HostMemory(address=addresses[0], num_bytes=pool.nbytes)
    segment_bytes = (2 * num_pages * page_bytes * 2 // 3 >> 24 << 24) + (64 << 20)

    with (
        tempfile.TemporaryDirectory() as folder,
        MooncakePool(Path(folder), num_stores=3, segment_bytes=segment_bytes) as processes,
    ):
        options = MooncakeStoreOptions(mooncake_master_addr=processes.master)
        store = MooncakeStore(options, StoreContext(namespace="b", page_bytes=page_bytes, host_memory=memory))
        engine = open_engine(options.resolved().network("127.0.0.1"), STORES_USER)
        client = PoolClient(engine, PoolSettings(master=processes.master))
        threads = ThreadPoolExecutor(store.max_writers)

        def timed(case: str, work: Callable[[slice], bool]) -> Row:
            """Our puts come from as many threads as in an engine; one batch is under way at a time in all cases."""
            starts = range(0, num_pages, settings.batch_pages)
            parts = [slice(first, min(first + settings.batch_pages, num_pages)) for first in starts]
            start_s = time.perf_counter()
            assert all(threads.map(work, parts) if case == "put" else map(work, parts)), case
            return "mooncake", case, num_pages * page_bytes / 1e9 / (time.perf_counter() - start_s)

        for round_index in range(settings.num_rounds + 1):
            keys = page_digests(range(round_index, round_index + num_pages), 1, "bench")
            names = [f"plain-{key.hex()}" for key in keys]

            def put_plain(part: slice, names: list[str] = names) -> bool:
                pieces = [(address,) for address in addresses[part]]
                codes = client.put(names[part], pieces, [(page_bytes,)] * len(pieces), num_replicas=1)
                return not any(codes)

            def get_plain(part: slice, names: list[str] = names) -> bool:
                return all(size == page_bytes for size in client.get(names[part], addresses_into[part], page_bytes))

            def put(part: slice, keys: list[bytes] = keys) -> bool:
                return store.put(keys[part], pages[part]) == len(keys[part])

            def get(part: slice, keys: list[bytes] = keys) -> bool:
                return store.get(keys[part], into[part]) == len(keys[part])

            start_s = time.perf_counter()
            assert store.exists(page_digests(range(10**6, 10**6 + 128), 1, "missing")) == 0
            lookup_ms = 1e3 * (time.perf_counter() - start_s)
            cases: list[tuple[str, Callable[[slice], bool]]] = [
                ("plain write", put_plain),
                ("put", put),
                ("plain read", get_plain),
                ("get", get),
            ]
            if round_index % 2:  # each of a pair goes first in every other round
                cases = [cases[index] for index in (1, 0, 3, 2)]
            rows = [timed(case, work) for case, work in cases]
            if round_index > 0:
                yield from rows
                yield "mooncake", "look-up of 128 missing pages, ms", lookup_ms
            client.remove([*names, *store.names(keys)])
        threads.shutdown()
        client.close()
        store.close()


def report(rows: list[Row]) -> None:
    medians: dict[tuple[str, str], float] = {}
    for folder, case in dict.fromkeys((folder, case) for folder, case, _ in rows):
        medians[folder, case] = statistics.median(speed for *where, speed in rows if where == [folder, case])
    print(f"{'folder':<28}{'case':<16}{'GB/s':>7}{'  to plain':>10}")
    for (folder, case), speed in medians.items():
        ratio = f"{speed / medians[folder, PAIRS[case]]:>10.2f}" if case in PAIRS else ""
        print(f"{Path(folder).parent!s:<28}{case:<16}{speed:>7.2f}{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("/dev/shm"), Path(tempfile.gettempdir())])
    parser.add_argument("--json", type=Path, help="also write every round to this file")
    parser.add_argument("--page-bytes", type=int, default=1 << 20)
    parser.add_argument("--num-pages", type=int, default=256)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--num-rounds", type=int, default=5)
    parser.add_argument("--batch-pages", type=int, default=POOL_BATCH, help="with --mooncake: pages in one call")
    parser.add_argument("--mooncake", action="store_true", help="measure a Mooncake pool instead of folders")
    settings = parser.parse_args()
    if settings.mooncake:
        rows = list(rounds_in_pool(settings))
    else:
        rows = [
            row
            for folder in settings.folders
            for row in rounds_in(Path(tempfile.mkdtemp(prefix="kvist-bench-", dir=folder)), settings)
        ]
    report(rows)
    if settings.json:
        each = [{"folder": folder, "case": case, "gb_per_s": speed} for folder, case, speed in rows]
        write_report(settings.json, settings, rows=each)


if __name__ == "__main__":
    main()
