"""The file store under broken disks, and beside another process that rewrites its pages.

test_file_store.py damages single files; these tests break system calls."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvist.store.file import FileStore
from kvist.testing.clocks import FakeClock
from tests.broken_disk import BROKEN, BROKEN_IDS, refusing
from tests.store import store_process
from tests.store.store_process import FILE_BYTES, KEYS, open_files

STORE_SCRIPT = Path(__file__).with_name("store_process.py")


def put(store: FileStore, first: int, last: int) -> int:
    return store.put(KEYS[first:last], [store_process.page_of(key) for key in KEYS[first:last]])


def get(store: FileStore, first: int, last: int) -> int:
    into = [memoryview(bytearray(store_process.PAGE_BYTES)) for _ in KEYS[first:last]]
    num_hits = store.get(KEYS[first:last], into)
    for key, page in zip(KEYS[first : first + num_hits], into, strict=False):
        assert page == store_process.page_of(key)
    return num_hits


def makes_nothing(_path: object, flags: int, *_: object) -> bool:
    return not flags & os.O_CREAT


@pytest.mark.parametrize("number", BROKEN, ids=BROKEN_IDS)
@pytest.mark.parametrize("call", ["open", "makedirs", "pwrite", "writev", "utime", "replace"])
def test_put_stores_fewer_pages_and_get_still_reads_when_any_disk_call_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    clock = FakeClock()
    store = open_files(tmp_path, 64 * FILE_BYTES, clock=clock)
    put(store, 0, 2)
    with monkeypatch.context() as broken:
        spares = makes_nothing if call == "open" else None
        if call == "makedirs":  # the next page needs a new folder
            assert not any(tmp_path.rglob(f"{KEYS[2].hex()[:2]}/"))
        broken.setattr(os, call, refusing(getattr(os, call), number, spares=spares))
        assert put(store, 0, 4) == 2
        assert get(store, 0, 4) == 2
    assert set(store.stats().errors) == {errno.errorcode[number]}
    assert list(tmp_path.rglob("*.new")) == []
    assert put(store, 0, 4) == 2  # writing is suspended
    clock.advance(5.0)
    assert put(store, 0, 4) == 4
    assert get(store, 0, 4) == 4
    assert store.stats().stored_bytes == 4 * FILE_BYTES


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("call", ["open", "fstat", "readv"])
def test_an_unreadable_disk_gives_misses_and_keeps_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    store = open_files(tmp_path, 64 * FILE_BYTES)
    put(store, 0, 2)
    with monkeypatch.context() as broken:
        broken.setattr(os, call, refusing(getattr(os, call), number))
        assert get(store, 0, 2) == 0
    stats = store.stats()
    assert (stats.num_misses, stats.num_broken, stats.errors) == (2, 0, {errno.errorcode[number]: 1})
    assert get(store, 0, 2) == 2


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("depth", range(3))
def test_the_cap_holds_on_a_disk_that_cannot_be_scanned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int, number: int
) -> None:
    store = open_files(tmp_path, 4 * FILE_BYTES)
    put(store, 0, 4)

    def is_above(folder: object) -> bool:
        return len(Path(os.fspath(folder)).relative_to(tmp_path).parts) < depth  # type: ignore[call-overload]

    with monkeypatch.context() as broken:
        broken.setattr(os, "scandir", refusing(os.scandir, number, spares=is_above))
        assert put(store, 4, 5) == 0
    assert put(store, 5, 12) == 4
    assert len(list(tmp_path.rglob("*.page"))) == 4
    assert store.stats().stored_bytes == 4 * FILE_BYTES


def test_pages_rewritten_by_another_process_are_read_whole_or_missed(tmp_path: Path) -> None:
    arguments = [str(tmp_path), str(6 * FILE_BYTES), "0", "20", "1000000"]  # each round evicts and writes all of them
    process = subprocess.Popen([sys.executable, str(STORE_SCRIPT), *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "20\n"
        store = open_files(tmp_path, 6 * FILE_BYTES)
        num_hits = num_asked = 0
        give_up_s = time.monotonic() + 60
        while num_hits < 300 or num_hits == num_asked:
            assert time.monotonic() < give_up_s
            num_hits += get(store, num_asked % 20, num_asked % 20 + 1)
            num_asked += 1
        assert (store.stats().num_broken, store.stats().errors) == (0, {})
    finally:
        process.kill()
        process.wait(timeout=60)
        assert process.stdout is not None
        process.stdout.close()
