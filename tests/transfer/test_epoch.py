"""Epochs of running and ended engines, as their lock files show them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvist.request import EpochId
from kvist.transfer.epoch import EpochLock, EpochWatch, lock_path, new_epoch, num_live_epochs, sweep

HOLD = "import sys; from pathlib import Path; from kvist.transfer.epoch import EpochLock;" + (
    "lock = EpochLock(Path(sys.argv[1]), sys.argv[2]); print('held', flush=True); sys.stdin.read()"
)


def test_new_epochs_are_unique() -> None:
    assert len({new_epoch() for _ in range(100)}) == 100


@pytest.mark.e2e
def test_the_epoch_of_a_killed_process_is_dead_and_of_a_running_one_is_not(tmp_path: Path) -> None:
    epoch = new_epoch()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), epoch], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with process, process.stdin:
        assert process.stdout.readline() == b"held\n"
        watch = EpochWatch(tmp_path)
        assert not watch.is_dead(epoch)
        process.kill()
        process.wait(timeout=60)
    assert watch.is_dead(epoch)


def test_an_epoch_whose_file_was_removed_is_alive_until_its_process_ends(tmp_path: Path) -> None:
    lock, watch = EpochLock(tmp_path, EpochId("e1")), EpochWatch(tmp_path)
    assert not watch.is_dead(EpochId("e1"))
    lock_path(tmp_path, EpochId("e1")).unlink()
    assert not watch.is_dead(EpochId("e1"))
    lock.close()
    assert watch.is_dead(EpochId("e1"))


def test_a_late_watch_still_finds_a_dead_epoch(tmp_path: Path) -> None:
    EpochLock(tmp_path, EpochId("e1")).close()
    sweep(tmp_path)  # a restart
    assert EpochWatch(tmp_path).is_dead(EpochId("e1"))


def test_two_concurrent_watches_are_not_mistaken_for_the_owner(tmp_path: Path) -> None:
    EpochLock(tmp_path, EpochId("e1")).close()
    held = os.open(lock_path(tmp_path, EpochId("e1")), os.O_RDONLY)
    import fcntl

    fcntl.flock(held, fcntl.LOCK_SH)
    assert EpochWatch(tmp_path).is_dead(EpochId("e1"))
    os.close(held)


def test_sweep_keeps_live_epochs_and_removes_those_dead_for_long(tmp_path: Path) -> None:
    living = EpochLock(tmp_path, EpochId("living"))
    EpochLock(tmp_path, EpochId("dead")).close()
    os.utime(lock_path(tmp_path, EpochId("dead")), (0, 0))  # a long-running engine: the file is old, its end is recent
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert num_live_epochs(tmp_path) == 1
    os.utime(lock_path(tmp_path, EpochId("dead")), (0, 0))  # found dead long ago
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-living.lock"]
    living.close()
