"""The host tier's folder under broken disks, too little memory, and inconsistent files.

test_persistence.py damages single files; these tests break system calls and mix whole files."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from kvist.errors import ConfigError
from kvist.kv.tiers.host import HostTier
from kvist.memory.host_pool import HostPool
from tests.broken_disk import BROKEN, BROKEN_IDS, refusing
from tests.memory.persistence_process import NUM_PAGES, Writer, digest_of, open_folder, page_of


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
