"""The file store under faults: damaged files, full disks, lost folders, and other processes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvist.errors import StoreError
from kvist.store import disk_budget
from kvist.store.file import FileStore
from kvist.testing.clocks import FakeClock
from tests.store import store_process
from tests.store.store_process import FILE_BYTES, KEYS, PAGE_BYTES, page_of

SCRIPT = Path(__file__).with_name("store_process.py")


def open_files(folder: Path, num_pages: int = 64, clock: FakeClock | None = None) -> FileStore:
    return store_process.open_files(folder, num_pages * FILE_BYTES, clock=clock)


def put(store: FileStore, first: int, last: int) -> int:
    return store.put(KEYS[first:last], [page_of(key) for key in KEYS[first:last]])


def get(store: FileStore, first: int, last: int) -> int:
    into = [memoryview(bytearray(PAGE_BYTES)) for _ in KEYS[first:last]]
    num_hits = store.get(KEYS[first:last], into)
    for key, page in zip(KEYS[first : first + num_hits], into, strict=False):
        assert page == page_of(key)
    return num_hits


def pages_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.page"))


def file_of(folder: Path, index: int) -> Path:
    return next(folder.rglob(f"{KEYS[index].hex()}.page"))


def unfinished_in(folder: Path) -> list[Path]:
    return list(folder.rglob("*.new"))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name) / "store"


# ---------------------------------------------------------------- damaged files


def flip(offset: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[offset] ^= 0x10
        path.write_bytes(content)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the first byte": flip(4096),
    "a bit of the last byte": flip(-1),
    "the magic": flip(0),
    "the version": flip(8),
    "the page size": flip(12),
    "the namespace's hash": flip(20),
    "the key": flip(36),
    "the seal": flip(68),
    "the end of the seal": flip(99),
    "the namespace": flip(100),
    "the end of the header": flip(4095),
    "cut short": lambda path: os.truncate(path, FILE_BYTES - 1),
    "header only": lambda path: os.truncate(path, 4096),
    "empty": lambda path: os.truncate(path, 0),
    "too long": lambda path: os.truncate(path, FILE_BYTES + 1),
    "zeros": lambda path: path.write_bytes(bytes(FILE_BYTES)),
    "another page": lambda path: shutil.copy(file_of(path.parents[2], 0), path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_page_is_a_miss_counted_and_removed_and_can_be_stored_again(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    store = open_files(tmp_path)
    put(store, 0, 3)
    damage(file_of(tmp_path, 1))
    assert get(store, 0, 3) == 1
    stats = store.stats()
    assert (stats.num_broken, stats.num_misses, stats.errors) == (1, 2, {})
    assert len(pages_in(tmp_path)) == 2
    assert put(store, 0, 3) == 3
    assert get(store, 0, 3) == 3


def test_every_damaged_page_of_a_call_is_removed_so_that_one_put_restores_the_prefix(tmp_path: Path) -> None:
    store = open_files(tmp_path)
    put(store, 0, 8)
    for index in (1, 2, 6):
        flip(-1)(file_of(tmp_path, index))
    assert get(store, 0, 8) == 1
    assert store.stats().num_broken == 3
    assert put(store, 0, 8) == 8
    assert get(store, 0, 8) == 8


def test_a_file_of_the_wrong_size_does_not_exist_and_put_replaces_it(tmp_path: Path) -> None:
    store = open_files(tmp_path)
    put(store, 0, 1)
    os.truncate(file_of(tmp_path, 0), 5000)
    assert store.exists(KEYS[:1]) == 0
    assert put(store, 0, 1) == 1
    assert get(store, 0, 1) == 1


def test_a_page_of_another_namespace_is_not_accepted_even_from_our_own_folder(tmp_path: Path) -> None:
    put(open_files(tmp_path / "a"), 0, 1)
    other = store_process.open_files(tmp_path / "b", 9 * FILE_BYTES, namespace="other")
    put(other, 0, 1)
    shutil.copy(file_of(tmp_path / "a", 0), file_of(tmp_path / "b", 0))
    assert b"processes" in file_of(tmp_path / "b", 0).read_bytes()[:4096]  # people can read the namespace in the header
    assert get(other, 0, 1) == 0
    assert other.stats().num_broken == 1


def test_a_folder_in_place_of_a_page_is_an_error_that_is_counted(tmp_path: Path) -> None:
    store = open_files(tmp_path)
    put(store, 0, 2)
    path = file_of(tmp_path, 0)
    path.unlink()
    path.mkdir()
    assert get(store, 0, 2) == 0
    assert sum(store.stats().errors.values()) + store.stats().num_broken >= 1


# ---------------------------------------------------------------- the folder


def test_a_missing_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    put(open_files(tmp_path / "deep" / "store"), 0, 1)
    assert (tmp_path / "deep" / "store").stat().st_mode & 0o777 == 0o700
    assert file_of(tmp_path, 0).stat().st_mode & 0o777 == 0o600
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "deep" / "store").rglob("*"))


def test_a_folder_removed_while_running_is_made_again(tmp_path: Path) -> None:
    store = open_files(tmp_path / "store", num_pages=2)
    put(store, 0, 2)
    shutil.rmtree(tmp_path / "store")
    assert (get(store, 0, 2), store.exists(KEYS[:2]), store.stats().stored_bytes) == (0, 0, 0)
    assert put(store, 0, 2) == 2
    assert get(store, 0, 2) == 2
    other = open_files(tmp_path / "store", num_pages=2)
    assert put(other, 2, 4) == 2  # the cap holds for both, in the new folder
    assert len(pages_in(tmp_path)) == 2
    assert store.stats().errors == {}


@pytest.mark.usefixtures("as_unprivileged_user")
def test_a_folder_that_cannot_be_written_is_refused_when_opened(open_folder: Path) -> None:
    open_folder.mkdir(mode=0o500)
    with pytest.raises(StoreError, match=r"cannot open the file store in .*store: .*Name a folder"):
        open_files(open_folder)
    open_folder.chmod(0o700)
    put(open_files(open_folder), 0, 1)
    next(open_folder.glob("?" * 32)).chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        open_files(open_folder)


def test_a_file_in_place_of_the_folder_is_refused_when_opened(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder")
    with pytest.raises(StoreError, match="store"):
        open_files(tmp_path / "store")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_that_another_user_made_is_refused(tmp_path: Path) -> None:
    put(open_files(tmp_path), 0, 1)
    os.chown(next(tmp_path.glob("?" * 32)), 65534, 65534)
    with pytest.raises(StoreError, match="belongs to another user"):
        open_files(tmp_path)


@pytest.mark.usefixtures("as_unprivileged_user")
def test_with_permission_taken_away_pages_are_misses_and_nothing_is_written_for_a_while(open_folder: Path) -> None:
    clock = FakeClock()
    store = open_files(open_folder, clock=clock)
    put(store, 0, 2)
    namespace = next(open_folder.glob("?" * 32))
    namespace.chmod(0)
    assert (get(store, 0, 2), store.exists(KEYS[:2]), put(store, 0, 3)) == (0, 0, 0)
    num_errors = store.stats().errors["EACCES"]
    assert num_errors >= 3
    namespace.chmod(0o700)
    assert get(store, 0, 2) == 2  # reading goes on
    assert put(store, 0, 3) == 2  # writing waits
    clock.advance(5.0)
    assert put(store, 0, 3) == 3
    assert set(store.stats().errors) == {"EACCES"}
    assert store.stats().stored_bytes == 3 * FILE_BYTES


def test_foreign_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    ours = tmp_path / ("0" * 32) / "ab"
    strangers = [tmp_path / "photo.page", tmp_path / "a" / "b" / "c.new", ours / "notes.new", ours / "x.page"]
    for path in strangers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(3 * FILE_BYTES))
        os.utime(path, (0, 0))
    store = open_files(tmp_path, num_pages=2)
    assert put(store, 0, 2) == 2
    put(store, 2, 4)
    assert all(path.exists() for path in strangers)


# ---------------------------------------------------------------- a full disk


def test_on_a_full_disk_put_stores_fewer_and_tries_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    store = open_files(tmp_path, clock=clock)
    write, room = os.writev, 2

    def writev(fd: int, content: list[bytes]) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room -= 1
        return write(fd, content)

    monkeypatch.setattr(os, "writev", writev)
    with caplog.at_level(logging.WARNING):
        assert put(store, 0, 4) == 2
        assert put(store, 0, 4) == 2  # writing is suspended
    assert store.stats().errors == {"ENOSPC": 1}
    assert len(caplog.records) == 1
    assert unfinished_in(tmp_path) == []
    assert store.stats().stored_bytes == 2 * FILE_BYTES
    assert get(store, 0, 2) == 2
    clock.advance(5.0)
    room = 9
    assert put(store, 10, 14) == 4


def test_on_a_disk_that_stays_full_new_pages_replace_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    store = open_files(tmp_path, num_pages=64, clock=clock)
    write = os.writev

    def writev(fd: int, content: list[bytes]) -> int:
        if len(pages_in(tmp_path)) >= 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, content)

    monkeypatch.setattr(os, "writev", writev)
    for index in range(40):
        put(store, index, index + 1)
        clock.advance(5.0)
    assert store.exists([KEYS[39]]) + store.exists([KEYS[38]]) >= 1
    assert store.exists([KEYS[0]]) == 0
    assert store.stats().num_written >= 30


def test_a_page_that_the_kernel_cuts_short_is_not_stored(tmp_path: Path) -> None:
    store = open_files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES // 2, hard))
    try:
        assert put(store, 0, 2) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.stats().errors == {"ENOSPC": 1}
    assert pages_in(tmp_path) + unfinished_in(tmp_path) == []
    assert store.stats().stored_bytes == 0


# ---------------------------------------------------------------- recency and the cap


def age(path: Path, seconds: float) -> int:
    """Make a file unused for that long; return its mtime."""
    used_ns = path.stat().st_mtime_ns - int(seconds * 1e9)
    os.utime(path, ns=(used_ns, used_ns))
    return path.stat().st_mtime_ns


def test_reading_a_page_updates_its_mtime_at_most_once_a_minute(tmp_path: Path) -> None:
    store = open_files(tmp_path)
    put(store, 0, 2)
    recent, old = age(file_of(tmp_path, 0), 30), age(file_of(tmp_path, 1), 90)
    get(store, 0, 2)
    assert file_of(tmp_path, 0).stat().st_mtime_ns == recent
    assert file_of(tmp_path, 1).stat().st_mtime_ns > old + 60 * 10**9


def test_eviction_respects_the_writes_and_reads_of_another_process(tmp_path: Path) -> None:
    a, b = open_files(tmp_path, num_pages=4), open_files(tmp_path, num_pages=4)
    put(a, 0, 1)
    put(b, 1, 2)
    put(a, 2, 3)
    put(b, 3, 4)
    for index in range(4):
        age(file_of(tmp_path, index), 3600)
    assert get(a, 0, 1) == 1
    put(b, 4, 5)  # b has written fewest pages, but page 1 is the oldest
    put(a, 5, 6)
    assert [b.exists([key]) for key in KEYS[:6]] == [1, 0, 0, 1, 1, 1]


def test_a_page_used_since_the_scan_is_not_evicted_as_old(tmp_path: Path) -> None:
    put(open_files(tmp_path, num_pages=2), 0, 2)
    age(file_of(tmp_path, 0), 7200)
    age(file_of(tmp_path, 1), 3600)
    store = open_files(tmp_path, num_pages=2)  # its scan found both pages
    assert get(store, 0, 1) == 1
    put(store, 2, 3)
    assert [store.exists([key]) for key in KEYS[:3]] == [1, 0, 1]


def test_a_page_written_elsewhere_since_the_scan_is_evicted_before_one_used_later(tmp_path: Path) -> None:
    put(open_files(tmp_path, num_pages=3), 0, 2)
    age(file_of(tmp_path, 0), 7200)
    age(file_of(tmp_path, 1), 3600)
    store = open_files(tmp_path, num_pages=3)
    put(open_files(tmp_path, num_pages=3), 2, 3)
    age(file_of(tmp_path, 2), 1800)
    assert get(store, 0, 1) == 1
    put(store, 3, 4)  # replaces page 1, the only known old page
    put(store, 4, 5)
    assert [store.exists([key]) for key in KEYS[:5]] == [1, 0, 0, 1, 1]


def test_the_cap_is_for_all_namespaces_of_a_folder(tmp_path: Path) -> None:
    store = open_files(tmp_path, num_pages=3)
    other = store_process.open_files(tmp_path, 3 * FILE_BYTES, namespace="other")
    put(store, 0, 3)
    assert put(other, 0, 2) == 2
    assert len(pages_in(tmp_path)) == 3
    assert store.exists(KEYS[:3]) == 1


def test_a_smaller_cap_than_before_holds_from_the_start(tmp_path: Path) -> None:
    put(open_files(tmp_path, num_pages=8), 0, 8)
    store = open_files(tmp_path, num_pages=3)
    assert store.exists(KEYS[:8]) == 3
    assert store.stats().stored_bytes == 3 * FILE_BYTES


def test_a_much_smaller_cap_is_reached_with_one_scan_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(open_files(tmp_path), 0, 20)
    scans: list[object] = []
    scan = disk_budget.DiskBudget._scan

    def counted_scan(*of: Any) -> int:
        scans.append(of)
        return scan(*of)

    monkeypatch.setattr(disk_budget.DiskBudget, "_scan", counted_scan)
    monkeypatch.setattr(disk_budget, "_MAX_STATS_PER_RESERVE", 2)
    store = open_files(tmp_path, num_pages=4)
    assert (store.exists(KEYS[:20]), store.stats().stored_bytes, len(scans)) == (4, 4 * FILE_BYTES, 1)


def test_a_wrong_number_in_the_lock_file_is_corrected(tmp_path: Path) -> None:
    put(open_files(tmp_path, num_pages=4), 0, 2)
    for wrong in (b"", b"\xff" * 16, b"torn"):
        (tmp_path / "in-use.lock").write_bytes(wrong)
        assert open_files(tmp_path, num_pages=4).stats().stored_bytes == 2 * FILE_BYTES


def test_unfinished_files_of_dead_processes_are_removed_and_those_being_written_kept(tmp_path: Path) -> None:
    put(open_files(tmp_path), 0, 1)
    folder = file_of(tmp_path, 0).parent
    dead, writing = folder / f"{KEYS[9].hex()}.01234567.new", folder / f"{KEYS[9].hex()}.89abcdef.new"
    for path in (dead, writing):
        path.write_bytes(bytes(1000))
    age(dead, 61)
    store = open_files(tmp_path)
    assert unfinished_in(tmp_path) == [writing]
    assert store.stats().stored_bytes == FILE_BYTES + 1000


def test_a_lock_that_is_never_released_only_stops_writing_after_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept_s: list[float] = []
    monkeypatch.setattr("kvist.store.disk_budget.time.sleep", slept_s.append)
    store = open_files(tmp_path)
    put(store, 0, 1)
    with (tmp_path / "in-use.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # the store's exclusive lock excludes a shared lock too
        assert put(store, 0, 2) == 1
        assert get(store, 0, 1) == 1
        assert store.stats().stored_bytes == FILE_BYTES
    assert store.stats().errors == {"ETIMEDOUT": 1}
    assert sum(slept_s) == pytest.approx(5.0)


def test_threads_waiting_for_the_lock_wait_five_seconds_in_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_files(tmp_path)
    first, *others = [threading.Thread(target=put, args=(store, n, n + 1), daemon=True) for n in range(3)]
    slept_s: list[float] = []
    pause = time.sleep

    def are_waiting() -> bool:
        frames = sys._current_frames()
        return all(frames[thread.ident or 0].f_code.co_filename == disk_budget.__file__ for thread in others)

    def sleep(pause_s: float) -> None:
        slept_s.append(pause_s)
        if len(slept_s) == 1:
            for thread in others:
                thread.start()
            while not are_waiting():
                pause(0.001)

    monkeypatch.setattr("kvist.store.disk_budget.time.sleep", sleep)
    with (tmp_path / "in-use.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first.start()
        first.join(60)  # the first thread has started the others
        for thread in others:
            thread.join(60)
    assert store.stats().errors == {"ETIMEDOUT": 3}
    assert sum(slept_s) == pytest.approx(5.0, abs=0.01)


# ---------------------------------------------------------------- several processes


def start(folder: Path, num_pages: int, first: int, last: int, num_rounds: int) -> subprocess.Popen[str]:
    arguments = [str(folder), str(num_pages * FILE_BYTES), str(first), str(last), str(num_rounds)]
    return subprocess.Popen([sys.executable, str(SCRIPT), *arguments], stdout=subprocess.PIPE, text=True)


def test_processes_that_write_the_same_pages_at_once_leave_each_whole(tmp_path: Path) -> None:
    processes = [start(tmp_path, 64, 0, 30, 1) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["30\n"] * 3
    assert get(open_files(tmp_path), 0, 30) == 30
    assert len(pages_in(tmp_path)) == 30
    assert unfinished_in(tmp_path) == []


def test_the_cap_holds_while_several_processes_write(tmp_path: Path) -> None:
    cap, rounds = 20, 4
    processes = [start(tmp_path, cap, first, first + 60, rounds) for first in (0, 60, 120)]
    most = 0
    for process in processes * rounds:
        assert process.stdout is not None
        assert int(process.stdout.readline()) >= 55  # a few are refused, when two processes find the same page to evict
        for each in processes:
            each.send_signal(signal.SIGSTOP)  # so that the folder does not change while it is counted
        most = max(most, len(pages_in(tmp_path)) + len(unfinished_in(tmp_path)))
        for each in processes:
            each.send_signal(signal.SIGCONT)
    assert [process.wait(timeout=60) for process in processes] == [0] * 3
    assert most <= cap + len(processes)
    store = open_files(tmp_path, cap)
    assert cap - len(processes) <= len(pages_in(tmp_path)) <= cap
    assert sum(get(store, index, index + 1) for index in range(180)) == len(pages_in(tmp_path))


def test_after_a_kill_at_any_moment_every_page_is_whole_or_absent(tmp_path: Path) -> None:
    num_killed_writing = 0
    for attempt in range(60):
        if attempt >= 10 and num_killed_writing >= 3:
            break
        process = start(tmp_path, 6, 0, 20, 1_000_000)  # each round evicts and writes all of them
        assert process.stdout is not None
        for _ in range(attempt % 3 + 1):
            assert process.stdout.readline() == "20\n"
        if attempt % 2:  # at any moment, and every other time in the middle of a write
            give_up_s = time.monotonic() + 1.0
            while not unfinished_in(tmp_path) and time.monotonic() < give_up_s:
                pass
        process.kill()
        process.wait(timeout=60)
        process.stdout.close()
        num_killed_writing += bool(unfinished_in(tmp_path))
        for path in unfinished_in(tmp_path):
            age(path, 61)
        store = open_files(tmp_path, num_pages=6)
        assert unfinished_in(tmp_path) == []
        there = len(pages_in(tmp_path))
        assert there <= 6
        assert sum(get(store, index, index + 1) for index in range(20)) == there
        assert store.stats().stored_bytes == there * FILE_BYTES
        assert (store.stats().num_broken, store.stats().errors) == (0, {})
    assert num_killed_writing >= 3
