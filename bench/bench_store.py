"""How fast does the file store write and read pages, compared with plain files of the same size in the same folder?

    python bench/bench_store.py [FOLDER ...] [--json FILE]

Without folders: shared memory and the temporary folder. Store and plain files take turns, so that a noisy machine slows
both. Prints the median of the rounds in GB/s, and the ratio of the two. The first round is not counted: it creates the
folders, which is slow on ext4 and happens once in a store's life. Files are read back while they are in the kernel's
page cache. `--json` writes {commit, hardware, settings, rows}, one row a round.
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
from kvist.store.backend import PageStore, StoreContext
from kvist.store.file import FileStore

Row = tuple[str, str, float]  # folder, case, GB/s
PAIRS = {"put": "plain write", "put, evicting": "plain write", "get": "plain read"}


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
    settings = parser.parse_args()
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
