"""The host tier's folder and the file store under broken disks, too little memory, and inconsistent files.

test_persistence.py and test_file_store.py damage single files; these tests break system calls and mix whole files."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvist.errors import ConfigError
from kvist.kv.tiers.host import HostTier
from kvist.memory.host_pool import HostPool
from kvist.store.file import FileStore
from kvist.testing.clocks import FakeClock
from tests.kv import store_process
from tests.kv.persistence_process import NUM_PAGES, Writer, digest_of, open_folder, page_of
from tests.kv.store_process import FILE_BYTES, KEYS, spec_of

STORE_SCRIPT = Path(__file__).with_name("store_process.py")
BROKEN = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE]
BROKEN_IDS = [errno.errorcode[number] for number in BROKEN]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Slot i holds page i of 8; every second one continues the one before."""
    writer = Writer(tmp_path / "kept", tmp_path / "run")
    for number in range(4):
        writer.write(number)
    writer.close()
    return tmp_path / "kept"


def restored_slots(folder: Path) -> set[int]:
    """Compare every byte of the restored pages, and let a host tier restore them."""
    persistent = open_folder(folder)
    try:
        restored = persistent.restore()
        for page in restored:
            assert persistent.tensor[page.slot].numpy().tobytes() == page_of(page.digest)
        HostTier(NUM_PAGES).restore(restored)
        return {page.slot for page in restored}
    finally:
        persistent.close()


# ---------------------------------------------------------------- the host tier's folder


def write_page(folder: Path, slot: int, digest: bytes, parent: bytes | None) -> None:
    persistent = open_folder(folder)
    persistent.restore()
    persistent.clear([slot])
    persistent.tensor[slot].numpy()[:] = np.frombuffer(page_of(digest), dtype=np.uint8)
    persistent.record([slot], [(digest, parent)])
    persistent.close()


def test_an_old_index_beside_newer_pages_restores_only_unchanged_pages(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "index", tmp_path / "index")
    write_page(folder, 2, digest_of(100), None)
    write_page(folder, 6, digest_of(101), None)
    shutil.copy(tmp_path / "index", folder / "index")
    assert restored_slots(folder) == {0, 1, 4, 5}  # 3 and 7 continued dropped pages


def test_a_page_that_two_slots_hold_is_restored_once(folder: Path) -> None:
    """The page was evicted and written to another slot before its old slot was overwritten."""
    write_page(folder, 9, digest_of(2), None)
    slots = restored_slots(folder)
    assert len(slots) == 8
    assert len(slots & {2, 9}) == 1
    assert restored_slots(folder) == slots


def test_pages_whose_parents_form_a_cycle_are_dropped(folder: Path) -> None:
    ring = [digest_of(number) for number in (100, 101, 102)]
    persistent = open_folder(folder)
    persistent.restore()
    for slot, (digest, parent) in enumerate(zip(ring, [ring[-1], *ring], strict=False), start=10):
        persistent.tensor[slot].numpy()[:] = np.frombuffer(page_of(digest), dtype=np.uint8)
        persistent.record([slot], [(digest, parent)])
    persistent.close()
    assert restored_slots(folder) == set(range(8))


def refusing(real: Callable[..., object], number: int, *, spares: Callable[..., bool] | None = None) -> object:
    def refuse(*arguments: object, **options: object) -> object:
        if spares is not None and spares(*arguments):
            return real(*arguments, **options)
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", BROKEN, ids=BROKEN_IDS)
@pytest.mark.parametrize(("module", "call"), [(os, "posix_fallocate"), (os, "pread"), (mmap, "mmap")])
def test_a_folder_on_a_broken_disk_is_refused_at_the_start_and_nothing_in_it_is_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: object, call: str, number: int
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(module, call, refusing(getattr(module, call), number))
        with pytest.raises(ConfigError, match=r"--hicache-persist .*cannot keep") as caught:
            open_folder(folder)
    assert caught.value.param == "hicache_persist"
    assert restored_slots(folder) == set(range(8))  # also: the lock was released


@pytest.mark.parametrize("which", range(4), ids=["lock", "index", "index again", "pages"])
def test_a_file_that_temporarily_cannot_be_opened_is_not_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """Another worker may hold the lock of the old file, and a second start is better than losing the pages."""
    inodes = {path.name: path.stat().st_ino for path in folder.iterdir()}
    real, num_calls = os.open, 0

    def refuse_once(*arguments: object, **options: object) -> int:
        nonlocal num_calls
        num_calls += 1
        if num_calls == which + 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(*arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as broken:
        broken.setattr(os, "open", refuse_once)
        with pytest.raises(ConfigError, match=r"--hicache-persist .*Too many open files"):
            open_folder(folder)
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == inodes
    assert restored_slots(folder) == set(range(8))


@pytest.mark.usefixtures("as_unprivileged_user")
def test_a_read_only_folder_is_refused_with_an_error_that_names_the_flag() -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "kept"
        path.mkdir(mode=0o500)
        with pytest.raises(ConfigError, match=r"--hicache-persist .*Permission denied") as caught:
            open_folder(path)
        assert caught.value.param == "hicache_persist"
        assert list(path.iterdir()) == []


def test_a_failed_memory_allocation_is_an_error_that_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"no memory for the host tier: .*lower --hicache-size") as caught:
        HostPool(1 << 30, 1 << 30, pinned=False)
    assert caught.value.param == "hicache_size"


# ---------------------------------------------------------------- the file store


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
    store = FileStore(spec_of(tmp_path, 64 * FILE_BYTES), clock)
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
    store = FileStore(spec_of(tmp_path, 64 * FILE_BYTES))
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
    store = FileStore(spec_of(tmp_path, 4 * FILE_BYTES))
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
        store = FileStore(spec_of(tmp_path, 6 * FILE_BYTES))
        num_hits = num_asked = 0
        give_up_s = time.monotonic() + 30
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
