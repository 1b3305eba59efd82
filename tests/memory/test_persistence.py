"""The host tier in a folder: which pages are restored after a restart, a kill, and damage of every kind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvist.clock import MonotonicClock
from kvist.engine.config import HostTierConfig
from kvist.errors import ConfigError
from kvist.kv.tiers.host import HostTier, SavedPage
from kvist.memory.device_pool import DevicePool
from kvist.memory.host_pool import HostPool
from kvist.memory.page_copier import PageMover
from kvist.memory.persistence import PersistentPages, reusable_bytes
from kvist.plan.tiers import BackUpPages
from kvist.testing.page_events import changed_pages
from tests.memory.persistence_process import LAYOUT, NUM_PAGES, PAGE_BYTES, Writer, digest_of, open_folder, page_of

SCRIPT = Path(__file__).with_name("persistence_process.py")
HEADER_BYTES, RECORD_BYTES = 64, 96


def fill(folder: Path, pools: Path, num_prefixes: int = 4) -> None:
    """Slot i holds page i; every second one continues the one before."""
    writer = Writer(folder, pools)
    for number in range(num_prefixes):
        writer.write(number)
    writer.close()


def checked(persistent: PersistentPages) -> list[SavedPage]:
    """Restore the pages and compare every byte."""
    restored = persistent.restore()
    for page in restored:
        assert persistent.tensor[page.slot].numpy().tobytes() == page_of(page.digest)
    HostTier(persistent.tensor.shape[0]).restore(restored)  # raises if a page comes before the page it continues
    return restored


def restored_slots(folder: Path, **options: object) -> set[int]:
    persistent = open_folder(folder, **options)  # type: ignore[arg-type]
    try:
        return {page.slot for page in checked(persistent)}
    finally:
        persistent.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(tmp_path / "kept", tmp_path / "run")
    return tmp_path / "kept"


def test_a_restore_reports_its_progress(folder: Path) -> None:
    persistent, reported = open_folder(folder), list[tuple[int, int]]()
    restored = persistent.restore(lambda num_done, num_pages: reported.append((num_done, num_pages)))
    assert reported == [(number, len(restored)) for number in range(1, 1 + len(restored))]
    persistent.close()


def test_pages_are_restored_with_their_prefixes_in_the_order_of_writing(folder: Path) -> None:
    persistent = open_folder(folder)
    restored = {page.slot: page for page in checked(persistent)}
    assert {slot: page.digest for slot, page in restored.items()} == {slot: digest_of(slot) for slot in range(8)}
    assert [restored[slot].parent for slot in range(8)] == [
        digest_of(slot - 1) if slot % 2 else None for slot in range(8)
    ]
    assert sorted(restored, key=lambda slot: restored[slot].last_use) == list(range(8))
    persistent.close()


def test_pages_written_after_a_restart_are_newer_than_restored_pages(folder: Path, tmp_path: Path) -> None:
    writer = Writer(folder, tmp_path / "run")
    assert len(writer.restored) == 8
    writer.write(4)
    writer.close()
    persistent = open_folder(folder)
    last_use = {page.slot: page.last_use for page in checked(persistent)}
    assert sorted(last_use, key=last_use.__getitem__) == list(range(10))
    persistent.close()


def test_the_restored_tier_matches_evicts_and_reports_its_pages() -> None:
    def page(slot: int, parent: bytes | None) -> SavedPage:
        return SavedPage(slot=slot, digest=digest_of(slot), parent=parent, last_use=slot + 1)

    tier = HostTier(4)
    tier.restore([page(0, None), page(2, None), page(1, digest_of(0))])
    assert tier.changes.take() == (changed_pages(*map(digest_of, (0, 2, 1)), tier="host"),)
    assert [found.slot for found in tier.match([digest_of(0), digest_of(1), digest_of(2)])] == [0, 1, 2]
    counts = tier.counts()
    assert (counts.free, counts.cached, counts.in_flight) == (1, 3, 0)
    slots = []
    for number in range(10, 13):
        reserved = tier.reserve(None, digest_of(number))
        assert reserved is not None
        slots.append(reserved.slot)
    assert slots == [3, 1, 0]  # the free one; the leaf written first; and then the page it continued


def test_flushed_pages_are_not_restored_but_later_pages_in_their_slots_are(folder: Path, tmp_path: Path) -> None:
    writer = Writer(folder, tmp_path / "run")
    writer.forget(2, 3, 4, 5)
    writer.write(2)  # into slots 4 and 5
    writer.close()
    assert restored_slots(folder) == {0, 1, 4, 5, 6, 7}


def test_a_slot_being_overwritten_has_no_record(folder: Path) -> None:
    persistent = open_folder(folder)
    persistent.restore()
    persistent.clear([2])
    persistent.close()
    assert restored_slots(folder) == {0, 1, 4, 5, 6, 7}  # 3 continued it


def test_a_page_whose_backup_failed_is_not_restored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(folder, tmp_path / "run")

    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(writer._mover._backups, "_copy", fail)
    with pytest.raises(AssertionError):
        writer.write(NUM_PAGES // 2)  # into slots 0 and 1
    writer.close()
    assert restored_slots(folder) == set(range(2, 8))


# ---------------------------------------------------------------- killed


def test_every_restored_page_is_whole_after_a_kill_at_any_moment(tmp_path: Path) -> None:
    folder, num_seen, number = tmp_path / "kept", 0, 0
    command = [sys.executable, str(SCRIPT), str(folder), str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as lives:
        assert lives.stdin is not None
        assert lives.stdout is not None
        for attempt in range(16):
            print(number, file=lives.stdin, flush=True)
            process_id = int(lives.stdout.readline())
            for written in range(number, number + 2 + attempt):
                assert lives.stdout.readline() == f"{written}\n"
            time.sleep(0.0007 * attempt)  # kills each worker at a different moment
            os.kill(process_id, signal.SIGKILL)
            while not lives.stdout.readline().endswith("over\n"):  # the kill may have cut a line
                assert lives.poll() is None
            persistent = open_folder(folder)
            restored = checked(persistent)
            num_seen += len(restored)
            assert len(restored) <= NUM_PAGES
            persistent.close()
            number += 1000
        lives.stdin.close()
    assert num_seen > 16 * 2  # at most two are being written


# ---------------------------------------------------------------- damage


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("offset", [0, 1, PAGE_BYTES // 2, PAGE_BYTES - 1])
def test_a_flipped_bit_in_a_page_drops_the_page_and_its_descendants(folder: Path, offset: int) -> None:
    flip(folder / "pages", 2 * PAGE_BYTES + offset)
    assert restored_slots(folder) == {0, 1, 4, 5, 6, 7}
    assert restored_slots(folder) == {0, 1, 4, 5, 6, 7}


@pytest.mark.parametrize("offset", range(0, RECORD_BYTES, 7))
def test_a_flipped_bit_in_a_record_drops_its_page(folder: Path, offset: int) -> None:
    flip(folder / "index", HEADER_BYTES + 3 * RECORD_BYTES + offset)
    assert restored_slots(folder) == {0, 1, 2, 4, 5, 6, 7}


def test_a_record_copied_to_another_slot_is_ignored(folder: Path) -> None:
    content = bytearray((folder / "index").read_bytes())
    pages = bytearray((folder / "pages").read_bytes())
    content[HEADER_BYTES + 8 * RECORD_BYTES :][:RECORD_BYTES] = b""
    content[HEADER_BYTES + 8 * RECORD_BYTES : HEADER_BYTES + 9 * RECORD_BYTES] = content[HEADER_BYTES:][:RECORD_BYTES]
    pages[8 * PAGE_BYTES : 9 * PAGE_BYTES] = pages[:PAGE_BYTES]
    (folder / "index").write_bytes(content)
    (folder / "pages").write_bytes(pages)
    assert restored_slots(folder) == set(range(8))


@pytest.mark.parametrize("offset", range(0, HEADER_BYTES, 5))
def test_a_flipped_bit_in_the_header_empties_the_pool_and_logs_a_warning(
    folder: Path, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    flip(folder / "index", offset)
    with caplog.at_level(logging.WARNING):
        assert restored_slots(folder) == set()
    assert "not restored" in caplog.text
    assert restored_slots(folder) == set()


DAMAGES: dict[str, tuple[Callable[[Path], object], set[int]]] = {
    "no pages": (lambda folder: (folder / "pages").unlink(), set()),
    "no index": (lambda folder: (folder / "index").unlink(), set()),
    "no lock": (lambda folder: (folder / "lock").unlink(), set(range(8))),
    "pages empty": (lambda folder: os.truncate(folder / "pages", 0), set()),
    "pages cut": (lambda folder: os.truncate(folder / "pages", 5 * PAGE_BYTES - 1), {0, 1, 2, 3}),
    "index empty": (lambda folder: os.truncate(folder / "index", 0), set()),
    "header cut": (lambda folder: os.truncate(folder / "index", HEADER_BYTES - 1), set()),
    "header only": (lambda folder: os.truncate(folder / "index", HEADER_BYTES), set()),
    "index cut": (lambda folder: os.truncate(folder / "index", HEADER_BYTES + 3 * RECORD_BYTES + 9), {0, 1, 2}),
    "index of noise": (lambda folder: (folder / "index").write_bytes(os.urandom(5000)), set()),
    "index is a link": (lambda folder: relink(folder / "index"), set()),
    "pages are a pipe": (lambda folder: put_pipe(folder / "pages"), set()),
}


def put_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def relink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(("damage", "left"), DAMAGES.values(), ids=DAMAGES.keys())
def test_only_undamaged_pages_are_restored(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], left: set[int]
) -> None:
    damage(folder)
    assert restored_slots(folder) == left
    fill(folder, tmp_path / "run")  # the folder can be used again
    assert restored_slots(folder) == set(range(8))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_files_of_another_user_are_replaced_and_a_folder_of_another_user_is_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.chown(folder / "index", 65534, 65534)
    with caplog.at_level(logging.WARNING):
        assert restored_slots(folder) == set()
    assert "is replaced" in caplog.text
    os.chown(folder, 65534, 65534)
    with pytest.raises(ConfigError, match=r"--hicache-persist .*another user") as caught:
        open_folder(folder)
    assert caught.value.param == "hicache_persist"


# ---------------------------------------------------------------- other settings


def test_pages_of_another_namespace_are_not_restored(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert restored_slots(folder, namespace="other") == set()
    assert "another model, layout, page size or tensor-parallel slice" in caplog.text
    assert restored_slots(folder) == set()  # the folder belongs to the other namespace now


def test_pages_of_another_size_are_not_restored(folder: Path) -> None:
    other = PersistentPages(folder, namespace="n", num_pages=NUM_PAGES, page_bytes=PAGE_BYTES // 2)
    assert other.restore() == []
    other.close()
    assert restored_slots(folder) == set()


@pytest.mark.parametrize(("num_pages", "left"), [(5, set(range(5))), (1, {0}), (40, set(range(8)))])
def test_a_resized_pool_keeps_the_pages_that_fit(folder: Path, num_pages: int, left: set[int]) -> None:
    assert restored_slots(folder, num_pages=num_pages) == left
    assert (folder / "pages").stat().st_size == num_pages * PAGE_BYTES
    assert restored_slots(folder) == left


def test_two_workers_never_share_a_folder(folder: Path) -> None:
    first = open_folder(folder)
    with pytest.raises(ConfigError, match=r"--hicache-persist .*another worker") as caught:
        open_folder(folder, namespace="other")
    assert caught.value.param == "hicache_persist"
    assert len(checked(first)) == 8  # the second worker changed nothing
    first.close()
    assert restored_slots(folder) == set(range(8))


# ---------------------------------------------------------------- folders that cannot be used


def test_a_full_disk_is_an_error_at_the_start_and_loses_no_stored_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = os.posix_fallocate

    def full(fd: int, offset: int, num_bytes: int) -> None:
        if num_bytes > NUM_PAGES * PAGE_BYTES:
            os.ftruncate(fd, num_bytes // 2)  # a part was allocated
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(fd, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"--hicache-persist .*No space left.*lower --hicache-size") as caught:
        open_folder(folder, num_pages=4 * NUM_PAGES)
    assert caught.value.param == "hicache_persist"
    assert (folder / "pages").stat().st_size == NUM_PAGES * PAGE_BYTES
    assert restored_slots(folder) == set(range(8))


def test_a_pool_larger_than_the_file_system_is_refused_and_its_space_released(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--hicache-persist"):
        PersistentPages(tmp_path / "kept", namespace="n", num_pages=1 << 20, page_bytes=1 << 30)
    assert (tmp_path / "kept" / "pages").stat().st_blocks == 0
    assert restored_slots(tmp_path / "kept") == set()  # also: the lock was released


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(ConfigError, match="--hicache-persist") as caught:
            open_folder(path)
        assert caught.value.param == "hicache_persist"


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    with pytest.raises(ConfigError, match="--hicache-persist"):
        open_folder(tmp_path)


def test_persistence_without_a_host_tier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--enable-hierarchical-cache"):
        HostTierConfig(hicache_persist=str(tmp_path))


@pytest.mark.gpu
def test_a_gpus_pool_in_shared_memory_is_pinned_copied_to_and_restored(tmp_path: Path) -> None:
    folder = Path("/dev/shm") / f"kvist-test-gpu-{os.getpid()}"
    try:
        persistent = open_folder(folder)
        host = HostPool(NUM_PAGES, PAGE_BYTES, pinned=True, persistent=persistent)
        assert host.tensor.is_pinned()
        device = DevicePool.create(LAYOUT, 2, device=torch.device("cuda", 0), directory=tmp_path)
        pages = device.tensor.view(2, -1).view(torch.uint8)
        pages[1] = torch.frombuffer(bytearray(page_of(digest_of(7))), dtype=torch.uint8).cuda()
        torch.cuda.synchronize()
        done = threading.Event()
        mover = PageMover(device, host, wakeup=done.set, clock=MonotonicClock())
        mover.start(BackUpPages(job_id=1, page_ids=(1,), host_slots=(5,), names=((digest_of(7), None),)))
        assert done.wait(60)
        mover.close()
        host.close()
        persistent.close()
        device.close()
        assert restored_slots(folder) == {5}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no shared memory")
def test_memory_that_the_folder_already_uses_counts_as_reusable(tmp_path: Path) -> None:
    folder = Path("/dev/shm") / f"kvist-test-{os.getpid()}"
    try:
        assert reusable_bytes(folder) == 0
        fill(folder, tmp_path / "run", 1)
        assert reusable_bytes(folder) == NUM_PAGES * PAGE_BYTES
        assert restored_slots(folder) == {0, 1}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_leftover_unlocked_lock_file_does_not_prevent_a_start(folder: Path) -> None:
    with contextlib.closing(os.fdopen(os.open(folder / "lock", os.O_RDWR))) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert restored_slots(folder) == set(range(8))
