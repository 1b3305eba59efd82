"""Chosen prompts, files written into the store and folders named by HTTP never give a client another's pages."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import xxhash

from kvist import wire
from kvist.clock import MonotonicClock
from kvist.errors import ConfigError, StoreError
from kvist.kv.keys import chain_digest, page_digests, page_keys
from kvist.memory.host_pool import HostPool
from kvist.memory.persistence import PersistentPages
from kvist.store.backend import StoreContext
from kvist.store.config import StorageConfig
from kvist.store.control import StorageControl
from kvist.store.file import FileStore
from kvist.store.mover import StoreMover

# Found in two seconds by a search of 5 * 2^20 pages: equal under xxh3_128 behind every 16 bytes.
_HEAD = (500, 600, 700, 800, 100, 200, 300, 400)
VICTIM = (*_HEAD, 24511, 8006, 23489, 39994, 9506, 8107, 38494, 39893)
ATTACKER = (*_HEAD, 22473, 23127, 25527, 24873, 36222, 47333, 11778, 667)
PAGE_BYTES = 64
KEYS = page_digests(range(8), 1, "store")
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


# ---------------------------------------------------------------- digests


@pytest.mark.case("digest-collision")
@pytest.mark.parametrize("prefix", [(), tuple(range(16)), tuple(range(320))], ids=["first", "second", "deep"])
def test_pages_that_collide_under_xxh3_have_different_digests(prefix: tuple[int, ...]) -> None:
    (victim_key,), (attacker_key,) = (page_keys(page, 16, 0, 1) for page in (VICTIM, ATTACKER))
    parent = os.urandom(16)
    assert xxhash.xxh3_128_digest(parent + victim_key) == xxhash.xxh3_128_digest(parent + attacker_key)
    one = page_digests(prefix + VICTIM, 16, "model")
    other = page_digests(prefix + ATTACKER, 16, "model")
    assert one[:-1] == other[:-1]
    assert one[-1] != other[-1]


@pytest.mark.case("digest-collision")
def test_a_digest_is_256_bits_of_a_hash_over_its_parent() -> None:
    assert len(chain_digest(KEYS[0], b"tokens")) == 32
    with pytest.raises(ValueError, match="32"):
        chain_digest(KEYS[0][:16], b"tokens")


# ---------------------------------------------------------------- the files of a store


def open_store(folder: Path, secret_path: Path | None = None) -> FileStore:
    context = StoreContext(namespace="model", page_bytes=PAGE_BYTES, secret_path=secret_path)
    return FileStore(folder, context, capacity_bytes=1 << 20)


def page_of(key: bytes) -> memoryview:
    return memoryview(key * (PAGE_BYTES // 32))


def put(store: FileStore, *keys: bytes) -> int:
    return store.put(keys, [page_of(key) for key in keys])


def get(store: FileStore, *keys: bytes) -> int:
    into = [memoryview(bytearray(PAGE_BYTES)) for _ in keys]
    num_hits = store.get(keys, into)
    assert [bytes(page) for page in into[:num_hits]] == [bytes(page_of(key)) for key in keys[:num_hits]]
    return num_hits


def file_of(folder: Path, key: bytes) -> Path:
    return next(folder.rglob(f"{key.hex()}.page"))


@pytest.mark.case("digest-collision")
def test_a_page_that_was_written_with_another_secret_is_a_miss(tmp_path: Path) -> None:
    """Everything about the forged file is right, but its seal: its writer lacks the secret."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    put(open_store(ours), KEYS[0])
    put(open_store(theirs), KEYS[0])
    forged = bytearray(file_of(theirs, KEYS[0]).read_bytes())
    forged[20:36] = file_of(ours, KEYS[0]).read_bytes()[20:36]  # the name of the folder, which anybody may see
    file_of(ours, KEYS[0]).write_bytes(forged)
    store = open_store(ours)
    assert get(store, KEYS[0]) == 0
    assert store.stats().num_broken == 1


@pytest.mark.case("digest-collision")
def test_stores_with_different_secrets_use_one_folder_and_never_meet(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 32)
    store = open_store(tmp_path / "store", tmp_path / "a")
    assert put(store, *KEYS) == 8
    assert get(open_store(tmp_path / "store", tmp_path / "a"), *KEYS) == 8
    assert get(open_store(tmp_path / "store", tmp_path / "b"), *KEYS) == 0
    assert not (tmp_path / "store" / "secret").exists()


@pytest.mark.parametrize("content", [None, "", "short", "x" * 5000])
def test_a_secret_that_is_missing_too_short_or_too_long_is_refused_with_a_command(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "secret").write_text(content)
    with pytest.raises(ConfigError, match=r"--hicache-storage-secret-file .*secret (cannot be read|has \d+ bytes)"):
        open_store(tmp_path / "store", tmp_path / "secret")
    assert not (tmp_path / "store").exists()


def test_the_stores_own_secret_is_drawn_once_and_outlives_the_folder(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    secret = tmp_path / "store" / "secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    first = secret.read_text()
    assert len(first.strip()) == 64
    open_store(tmp_path / "store")
    assert secret.read_text() == first
    for path in sorted((tmp_path / "store").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    put(store, KEYS[0])
    assert secret.read_text() == first
    assert get(open_store(tmp_path / "store"), KEYS[0]) == 1


@is_root
def test_a_page_of_another_users_is_a_miss_and_removed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, KEYS[0])
    path = file_of(tmp_path, KEYS[0])
    os.chown(path, 65534, 65534)
    assert store.exists(KEYS[:1]) == 0
    assert get(store, KEYS[0]) == 0
    assert not path.exists()


def test_a_link_in_place_of_a_page_is_not_followed_and_put_replaces_it(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    put(store, KEYS[0])
    path = file_of(tmp_path / "store", KEYS[0])
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert (store.exists(KEYS[:1]), get(store, KEYS[0])) == (0, 0)
    assert put(store, KEYS[0]) == 1
    assert not path.is_symlink()
    assert get(store, KEYS[0]) == 1


@pytest.mark.case("store-path")
@pytest.mark.parametrize("kind", ["symlink", "hard link", "named pipe", "folder"])
def test_a_lock_file_that_is_not_a_plain_file_of_ours_is_refused_and_nothing_is_written(
    tmp_path: Path, kind: str
) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious bytes")
    lock = tmp_path / "store" / "in-use.lock"
    lock.parent.mkdir(mode=0o700)
    make = {
        "symlink": lambda: lock.symlink_to(precious),
        "hard link": lambda: lock.hardlink_to(precious),
        "named pipe": lambda: os.mkfifo(lock),
        "folder": lambda: lock.mkdir(),
    }
    make[kind]()
    with pytest.raises(StoreError, match="Name a folder that only this user may write"):
        open_store(lock.parent)
    assert precious.read_bytes() == b"precious bytes"
    assert [path.name for path in lock.parent.iterdir()] == ["in-use.lock"]


@pytest.mark.case("store-path")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_may_write_is_refused_before_the_first_write(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(StoreError, match="other users can write to it: run chmod 700"):
        open_store(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_for_pages_that_survive_is_refused_when_others_may_write_it(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=r"--hicache-persist .* other users can write to it"):
        PersistentPages(folder, namespace="model", num_pages=2, page_bytes=PAGE_BYTES)
    assert list(folder.iterdir()) == []


# ---------------------------------------------------------------- PUT /hicache/storage-backend


def attach(root: Path, path: str, *more_roots: str) -> wire.StorageAnswer:
    config = StorageConfig(
        hicache_storage_backend="file", hicache_storage_options={"path": str(root)}, hicache_storage_roots=more_roots
    )
    clock = MonotonicClock()
    mover = StoreMover(HostPool(4, PAGE_BYTES, pinned=False), wakeup=lambda: None, clock=clock, deadline_s=10)
    context = StoreContext(namespace="model", page_bytes=PAGE_BYTES)
    storage = StorageControl(mover, config, context, lambda store, *_: store, wakeup=lambda: None, clock=clock)
    wanted = wire.AttachStore(backend="file", options={"path": path, "size": 0.01})
    storage.on_command(b"gateway", wire.StorageCommand(call_id="1", action="attach", store=wanted))
    give_up_s = time.monotonic() + 60
    while not (answers := storage.answers()):
        assert time.monotonic() < give_up_s
        storage.poll()
        time.sleep(0.001)
    assert storage.close()
    return answers[0][1]


@pytest.mark.case("store-path")
@pytest.mark.parametrize(
    "path",
    [
        "/etc",
        "/proc/self/cwd/x",
        "~nobody/x",
        "~/x",
        "x",
        "",
        "ROOT/../x",
        "ROOT/a/../../x",
        "ROOT/link/x",
        "ROOT-2",
        "ROOT/line\nkvist: forged",
        "ROOT/\x1b[2J",
    ],
)
def test_a_path_outside_the_roots_is_refused_by_name_and_nothing_is_opened_or_made(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    (root / "link").symlink_to(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    answer = attach(root, path.replace("ROOT", str(root)))
    assert (answer.error_code, answer.param) == ("invalid_request", "path")
    assert "\n" not in answer.message
    assert "\x1b" not in answer.message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.case("store-path")
def test_folders_below_the_configured_path_and_the_roots_may_be_attached(tmp_path: Path) -> None:
    root, more = tmp_path / "root", tmp_path / "more"
    (tmp_path / "alias").symlink_to(more)
    for path in (root, root / "a" / "b"):
        answer = attach(root, str(path))
        assert answer.status is not None, answer.message
        assert answer.status.options["path"] == str(path)
    assert attach(root, str(root), str(more)).error_code == "invalid_request", "roots stand instead of the path"
    for path in (more / "a", tmp_path / "alias" / "b"):
        answer = attach(root, str(path), str(tmp_path / "alias"))
        assert answer.status is not None, answer.message
