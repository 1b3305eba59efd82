"""The runtime directory is private, is large enough for the pools, and keeps no files of dead engines."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvist.cluster.leftovers import clear_runtime_dir
from kvist.engine.config import EngineConfig
from kvist.errors import ConfigError
from kvist.kv.layout import PageLayout
from kvist.memory import runtime_dir as module
from kvist.memory.device_pool import DevicePool, Room, plan_pool_size
from kvist.memory.runtime_dir import remove_leftovers, runtime_dir
from kvist.options import compose
from kvist.request import EpochId
from kvist.supervisor.engine_process import EngineSupervisor
from kvist.transfer.epoch import EpochLock

CPU = torch.device("cpu")
LAYOUT = PageLayout(num_kv_heads=2, num_layers=3, page_size=4, head_dim=4, dtype="float32")
MIB = 1 << 20
# An engine that makes its files, prints a line, and waits for its end.
ENGINE = """
import sys, time
from pathlib import Path
import torch
from kvist.memory.device_pool import DevicePool
from kvist.kv.layout import PageLayout
from kvist.request import EpochId
from kvist.transfer.epoch import EpochLock
lock = EpochLock(Path(sys.argv[1]), EpochId("killed"))
layout = PageLayout(num_kv_heads=2, num_layers=3, page_size=4, head_dim=4, dtype="float32")
pool = DevicePool.create(layout, 100, device=torch.device("cpu"), directory=Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ---------------------------------------------------------------- who may use it


@pytest.mark.case("small-shm")
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
def test_a_runtime_directory_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=r"--runtime-dir .*run .*others? .*write.*chmod 700") as refused:
        runtime_dir(str(folder))
    assert refused.value.param == "runtime_dir"
    assert list(folder.iterdir()) == []


@pytest.mark.case("small-shm")
def test_a_runtime_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(ConfigError, match="belongs to another user"):
        runtime_dir(str(tmp_path))


def test_the_users_runtime_directory_is_private_and_never_made_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHARED_MEMORY", tmp_path)
    made = runtime_dir()
    assert made == tmp_path / f"kvist-{os.geteuid()}"
    assert made.stat().st_mode & 0o777 == 0o700
    made.rename(tmp_path / "elsewhere")
    made.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="a symbolic link"):
        runtime_dir()


# ---------------------------------------------------------------- room


@pytest.mark.case("small-shm")
@pytest.mark.parametrize("max_total_tokens", [None, 10_000])
def test_a_runtime_directory_that_is_too_small_is_an_error_with_its_remedies(max_total_tokens: int | None) -> None:
    """There is plenty of memory, and weights do not count against the file system of the pool."""
    room = Room(free_bytes=MIB, directory=Path("/dev/shm/kvist-0"), enough_tokens=8192)
    with pytest.raises(ConfigError) as refused:
        plan_pool_size(
            LAYOUT,
            available_bytes=10_000 * MIB,
            weights_bytes=500 * MIB,
            mem_fraction_static=0.8,
            cap_tokens=30_000,
            max_total_tokens=max_total_tokens,
            room=room,
        )
    for word in ("/dev/shm/kvist-0 has 0.00 GiB free", "--runtime-dir", "--shm-size", "--max-total-tokens"):
        assert word in refused.value.message
    assert "weights" not in refused.value.message


def test_a_pool_limited_by_shared_memory_is_logged_as_limited() -> None:
    room = Room(free_bytes=100 * LAYOUT.page_bytes, directory=Path("/dev/shm/kvist-0"), enough_tokens=400)
    common: dict[str, Any] = {
        "available_bytes": 1000 * MIB,
        "weights_bytes": MIB,
        "mem_fraction_static": 0.8,
        "cap_tokens": 800,
    }
    size = plan_pool_size(LAYOUT, **common, room=room)
    assert size.num_pages == 100
    assert "/dev/shm/kvist-0 has" in size.reason
    assert plan_pool_size(LAYOUT, **common, max_total_tokens=40, room=room).num_pages == 10


@pytest.mark.case("small-shm")
def test_a_pool_reserves_all_its_memory_at_the_start(tmp_path: Path) -> None:
    pool = DevicePool.create(LAYOUT, 1000, device=CPU, directory=tmp_path)
    assert os.stat(pool.address.location).st_blocks * 512 >= 1000 * LAYOUT.page_bytes
    pool.close()


@pytest.mark.case("small-shm")
def test_a_full_file_system_is_an_error_at_the_start_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _offset: int, _length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"No space left on device.*--runtime-dir"):
        DevicePool.create(LAYOUT, 10, device=CPU, directory=tmp_path)
    assert names_in(tmp_path) == []


def test_engines_reserve_memory_one_at_a_time(tmp_path: Path) -> None:
    with module.allocation_lock(tmp_path):
        fd = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
    with module.allocation_lock(tmp_path):
        assert names_in(tmp_path) == []


# ---------------------------------------------------------------- what stays


def leave(directory: Path, name: str, *, age_s: float = 0.0) -> Path:
    path = directory / name
    path.write_bytes(bytes(100))
    path.chmod(0o600)
    os.utime(path, (path.stat().st_mtime - age_s,) * 2)
    return path


@pytest.mark.case("pool-file-left")
def test_without_living_engines_all_of_our_leftovers_and_nothing_else_are_removed(tmp_path: Path) -> None:
    for name in ("pool-1-0123abcd.pages", "epoch-e1.lock", "tp-1-0123abcd", "tp-1-0123abcd.pool.0"):
        leave(tmp_path, name)
    leave(tmp_path, "pool-2-0123abcd.new", age_s=100)
    leave(tmp_path, ".epoch-e2.lock.new", age_s=100)
    kept = ["notes.txt", "pool-x.pages", "pool-3-0123abcd.new"]  # the last file may be incomplete
    for name in kept[:2]:
        leave(tmp_path, name)
    assert remove_leftovers(tmp_path) == 6
    leave(tmp_path, kept[2])
    assert remove_leftovers(tmp_path) == 0
    assert names_in(tmp_path) == sorted(kept)


@pytest.mark.case("pool-file-left")
def test_while_an_engine_lives_the_pools_of_dead_engines_go_and_their_epochs_stay(tmp_path: Path) -> None:
    lock = EpochLock(tmp_path, EpochId("alive"))
    pool = DevicePool.create(LAYOUT, 2, device=CPU, directory=tmp_path)
    leave(tmp_path, "pool-1-0123abcd.pages")
    leave(tmp_path, "epoch-dead.lock")
    assert remove_leftovers(tmp_path) == 1
    assert names_in(tmp_path) == ["epoch-alive.lock", "epoch-dead.lock", Path(pool.address.location).name]
    pool.close()
    lock.close()
    assert remove_leftovers(tmp_path) == 2
    assert names_in(tmp_path) == []


def test_a_link_among_the_leftovers_is_not_followed(tmp_path: Path) -> None:
    target = leave(tmp_path, "notes.txt")
    (tmp_path / "pool-1-0123abcd.pages").symlink_to(target)
    remove_leftovers(tmp_path)
    assert target.exists()


@pytest.mark.e2e
@pytest.mark.case("pool-file-left")
async def test_the_parent_of_a_killed_engine_removes_its_pool(tmp_path: Path) -> None:
    """The cause does not matter: killed by others (as here), by its parent after the grace, or by its own limit."""
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert engine.stdout is not None
    assert engine.stdout.readline() == b"ready\n"
    assert len(names_in(tmp_path)) == 2
    clear_runtime_dir(str(tmp_path), [])
    assert len(names_in(tmp_path)) == 2, "it is alive"
    os.killpg(engine.pid, signal.SIGKILL)
    clear_runtime_dir(str(tmp_path), [engine.pid])  # as `kvist up` does; waits for the end
    engine.wait()
    engine.stdout.close()
    assert names_in(tmp_path) == []

    command = (sys.executable, "-c", ENGINE.replace("time.sleep(60)", "raise SystemExit(1)"), str(tmp_path))
    leave(tmp_path, "pool-1-0123abcd.pages")
    supervisor = EngineSupervisor(compose(EngineConfig, {"runtime_dir": str(tmp_path)}), command=command)
    with pytest.raises(Exception, match="ended with status 1 before it was ready"):
        await supervisor.run()
    assert names_in(tmp_path) == []
