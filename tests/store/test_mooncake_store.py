"""The Mooncake store against a real master and real stores: what it reads is what was put, or a miss.

test_mooncake_faults.py kills and stops the processes; tests/conformance/test_store.py has what all stores guarantee."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from kvist.cluster.ports import free_ports
from kvist.errors import ConfigError, StoreError, StoreUnreachable
from kvist.memory.host_pool import HostPool
from kvist.mooncake import requirements
from kvist.mooncake.client import PoolClient
from kvist.page_readers.reads import read_by_processes
from kvist.store.backend import HostMemory, StoreContext
from kvist.store.mooncake import OBJECT_HEADER_BYTES, MooncakeStore
from kvist.store.mooncake_options import MooncakeStoreOptions
from kvist.testing.mooncake_pool import MooncakePool
from kvist.testing.rounds import check_time, in_rounds
from tests.store.mooncake_writer import KEYS, PAGE_BYTES, open_store, page_of

Open = Callable[..., MooncakeStore]


@pytest.fixture
def open_here(mooncake_pool: MooncakePool, tmp_path: Path) -> Iterator[Open]:
    """Open stores whose namespaces no other test uses."""
    opened: list[MooncakeStore] = []

    def open_one(namespace: str = "n", **options: float) -> MooncakeStore:
        opened.append(open_store(mooncake_pool.master, f"{namespace} of {tmp_path}", **options))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def put(store: MooncakeStore, keys: Sequence[bytes]) -> int:
    return store.put(keys, [page_of(key) for key in keys])


def get(store: MooncakeStore, keys: Sequence[bytes]) -> int:
    """Call `store.get` and check every page that it counts as read."""
    into = [memoryview(bytearray(PAGE_BYTES)) for _ in keys]
    num_hits = store.get(keys, into)
    for key, page in zip(keys[:num_hits], into, strict=False):
        assert page == page_of(key)
    return num_hits


def overwrite(store: MooncakeStore, key: bytes, offset: int, content: bytes) -> None:
    """Write into the memory of the store that has the page: its metadata does not change."""
    (name,) = store.names([key])
    replicas = store._client.replicas([name])[name]
    assert replicas
    source = np.frombuffer(content, np.uint8).copy()
    for session, address in replicas:
        assert store._client._engine.write(session, [source.ctypes.data], [address + offset], [len(content)])


@pytest.mark.parametrize("offset", [0, 60, 99, OBJECT_HEADER_BYTES, OBJECT_HEADER_BYTES + PAGE_BYTES - 1])
def test_a_page_with_a_changed_byte_is_a_miss_and_removed_and_can_be_stored_again(open_here: Open, offset: int) -> None:
    store = open_here()
    put(store, KEYS[:4])
    overwrite(store, KEYS[1], offset, b"\xaa\x55")
    assert get(store, KEYS[:4]) == 1
    stats = store.stats()
    assert (stats.num_broken, stats.num_hits, stats.num_misses) == (1, 1, 3)
    assert [store.exists([key]) for key in KEYS[:4]] == [1, 0, 1, 1]
    assert put(store, KEYS[:4]) == 4
    assert get(store, KEYS[:4]) == 4


def test_another_page_under_the_key_is_a_miss(open_here: Open) -> None:
    """A restored master has returned such pages, with success."""
    store = open_here()
    put(store, KEYS[:2])
    page = page_of(KEYS[1])
    whole = store._seals.header(KEYS[1], page).ljust(OBJECT_HEADER_BYTES, b"\0") + bytes(page)
    overwrite(store, KEYS[0], 0, whole)
    assert get(store, KEYS[:1]) == 0
    assert store.stats().num_broken == 1
    assert get(store, KEYS[1:2]) == 1


def test_mooncake_2236_an_object_that_lacks_a_part_of_its_page_is_a_miss(open_here: Open) -> None:
    store = open_here()
    page = page_of(KEYS[0])
    half = np.frombuffer(store._seals.header(KEYS[0], page).ljust(OBJECT_HEADER_BYTES, b"\0") + page[:1000], np.uint8)
    put_codes = store._client.put(store.names(KEYS[:1]), [(half.ctypes.data,)], [(len(half),)], num_replicas=1)
    assert put_codes == [0]
    assert (store.exists(KEYS[:1]), get(store, KEYS[:1]), store.stats().num_broken) == (1, 0, 1)
    put(store, KEYS[:1])
    assert get(store, KEYS[:1]) == 1


def test_two_models_share_no_page(open_here: Open) -> None:
    one, two = open_here("model a"), open_here("model b")
    put(one, KEYS[:2])
    assert (two.exists(KEYS[:2]), get(two, KEYS[:2])) == (0, 0)
    put(two, KEYS[:1])
    assert get(one, KEYS[:2]) == 2


def test_workers_with_another_secret_share_no_page_and_accept_none(mooncake_pool: MooncakePool, tmp_path: Path) -> None:
    stores = []
    for name in ("red", "blue"):
        path = tmp_path / name
        path.write_text(name * 8)
        context = StoreContext(namespace=str(tmp_path), page_bytes=PAGE_BYTES, secret_path=path)
        stores.append(MooncakeStore(MooncakeStoreOptions(mooncake_master_addr=mooncake_pool.master), context))
    red, blue = stores
    put(red, KEYS[:1])
    assert blue.exists(KEYS[:1]) == 0
    put(blue, KEYS[:1])
    forged = blue._seals.header(KEYS[0], page_of(KEYS[0]))
    overwrite(red, KEYS[0], 0, forged)
    assert get(red, KEYS[:1]) == 0, "a seal made with another secret"
    for store in stores:
        store.close()


def test_pages_go_from_and_to_the_registered_host_pool(mooncake_pool: MooncakePool, tmp_path: Path) -> None:
    pool = np.zeros((8, PAGE_BYTES), np.uint8)
    memory = HostMemory(address=pool.ctypes.data, num_bytes=pool.nbytes)
    context = StoreContext(namespace=str(tmp_path), page_bytes=PAGE_BYTES, host_memory=memory)
    options = MooncakeStoreOptions(mooncake_master_addr=mooncake_pool.master)
    store, other = MooncakeStore(options, context), MooncakeStore(options, context)  # registered once, counted
    for row, key in zip(pool[:4], KEYS, strict=False):
        row[:] = np.frombuffer(page_of(key), np.uint8)
    assert store.put(KEYS[:4], [row.data for row in pool[:4]]) == 4
    store.close()
    assert other.get(KEYS[:4], [row.data for row in pool[4:]]) == 4
    np.testing.assert_array_equal(pool[4:], pool[:4])
    other.close()


def test_processes_read_pages_of_the_pool_into_the_host_pool(mooncake_pool: MooncakePool, tmp_path: Path) -> None:
    host = HostPool(8, PAGE_BYTES, pinned=False)
    pool = host.tensor.numpy()
    memory = HostMemory(address=host.tensor.data_ptr(), num_bytes=host.tensor.nbytes, fd=host.fd)
    context = StoreContext(namespace=str(tmp_path), page_bytes=PAGE_BYTES, host_memory=memory)
    options = MooncakeStoreOptions(mooncake_master_addr=mooncake_pool.master).resolved()
    store = MooncakeStore(options, context)
    assert put(store, KEYS[:3]) == 3
    by_process = read_by_processes(store, "mooncake", dataclasses.asdict(options), context, most=1)
    give_up_s = time.monotonic() + 60
    while not store.stats().num_hits < by_process.stats().num_hits:  # a process has read
        assert time.monotonic() < give_up_s
        pool[:] = 0
        assert by_process.get(KEYS[:4], [row.data for row in pool[:4]]) == 3
        for key, row in zip(KEYS[:3], pool, strict=False):
            assert row.data == page_of(key)
    overwrite(store, KEYS[1], OBJECT_HEADER_BYTES, b"\xaa\x55")
    assert by_process.get(KEYS[:3], [row.data for row in pool[:3]]) == 1
    assert by_process.stats().num_broken == 1
    by_process.close()
    host.close()


def test_a_store_with_a_local_cache_is_read_by_one_process(open_here: Open) -> None:
    """Each would have a cache of its own."""
    assert open_here(mooncake_local_cache_size=0.02).max_read_processes == 0
    assert open_here().max_read_processes > 1


def test_a_local_cache_answers_repeated_reads_with_the_same_bytes(open_here: Open) -> None:
    store = open_here(mooncake_local_cache_size=0.02)
    put(store, KEYS[:20])
    for _ in range(4):
        assert get(store, KEYS[:20]) == 20
    assert get(store, KEYS[:21]) == 20
    assert store.stats().num_broken == 0
    with pytest.raises(ConfigError, match="smaller than one page"):
        open_here(mooncake_local_cache_size=0.0001)


def test_memory_that_a_worker_gives_to_the_pool_is_used_and_leaves_with_the_worker(tmp_path: Path) -> None:
    with MooncakePool(tmp_path, num_stores=0) as pool:
        giver = open_store(pool.master, "n", mooncake_segment_size=0.033554432)
        assert put(giver, KEYS[:4]) == 4
        assert get(giver, KEYS[:4]) == 4
        taker = open_store(pool.master, "n")
        assert get(taker, KEYS[:4]) == 4
        giver.close()
        assert taker.exists(KEYS[:4]) == 0, "unmounted at once"
        assert put(taker, KEYS[:4]) == 0, "the pool has no memory left"
        taker.close()


def test_a_full_pool_keeps_the_first_pages_of_a_call_and_serves_those_that_it_has(tmp_path: Path) -> None:
    """Every page has been read a moment ago, so the master evicts none (all leased)."""
    flags = {"default_kv_lease_ttl": "60000"}
    with MooncakePool(tmp_path, segment_bytes=32 << 20, master_flags=flags) as pool:
        store = open_store(pool.master, "n")
        num_leased = 0
        while num_stored := put(store, KEYS[num_leased : num_leased + 16]):
            num_leased = store.exists(KEYS[: num_leased + num_stored])  # grants leases
            assert num_leased < 128, "more than the pool holds"
        assert num_leased >= 64
        assert store.stats().num_refused > 0
        assert store.stats().errors == {}, "no error: the pool is full"
        assert get(store, KEYS[:num_leased]) == num_leased
        assert put(store, KEYS[:16]) == 16, "stored already"
        assert put(store, KEYS[256:260]) == 0
        store.close()


def test_after_half_of_a_batch_has_failed_the_leading_pages_count(
    open_here: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_here()
    put(store, KEYS[:8])
    codes = {3: -800, 5: -703}
    real = PoolClient.put

    def put_half(client: PoolClient, names: Sequence[str], *args: object, **options: object) -> list[int]:
        found = real(client, names, *args, **options)  # type: ignore[arg-type]
        return [codes.get(index, code) for index, code in enumerate(found)]

    monkeypatch.setattr(PoolClient, "put", put_half)
    assert put(store, KEYS[8:16]) == 3
    assert put(store, KEYS[:16]) == 16, "the others were stored"
    assert store.stats().errors == {"transfer_failed": 1, "replica_not_ready": 1}
    assert store.stats().num_written == 8 + 6


def test_close_during_calls_ends_them_and_later_calls_find_nothing(open_here: Open) -> None:
    for _ in range(3):
        store = open_here()
        put(store, KEYS[:64])
        failures: list[BaseException] = []

        def work(read: bool, store: MooncakeStore = store, failures: list[BaseException] = failures) -> None:
            try:
                while not store._client.is_closed:
                    if read:
                        get(store, KEYS[:64])
                    else:
                        put(store, KEYS[64:128])
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(read,)) for read in (True, False, True)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        store.close()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert failures == []
        assert (store.exists(KEYS[:2]), get(store, KEYS[:2]), put(store, KEYS[:2])) == (0, 0, 0)
        store.close()


@pytest.mark.parametrize(("page_bytes", "num_pages"), [(100_000, 20), (530_000, 6)], ids=["as a copy", "in two pieces"])
def test_pages_of_any_size_come_back_also_beside_pages_that_were_stored_before(
    mooncake_pool: MooncakePool, page_bytes: int, num_pages: int
) -> None:
    context = StoreContext(namespace=f"size {page_bytes}", page_bytes=page_bytes)
    store = MooncakeStore(MooncakeStoreOptions(mooncake_master_addr=mooncake_pool.master), context)
    keys = KEYS[:num_pages]
    pages = [memoryview(np.random.default_rng(list(key)).bytes(page_bytes)) for key in keys]
    assert store.put(keys[3:5], pages[3:5]) == 2
    assert store.put(keys, pages) == len(keys)
    assert store.stats().num_written == len(keys)
    into = [memoryview(bytearray(page_bytes)) for _ in keys]
    assert store.get(keys, into) == len(keys)
    assert into == pages
    store.close()


def test_the_masters_figures_are_asked_for_with_the_key_of_the_file(
    mooncake_pool: MooncakePool, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("sk-of-the-master\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        store = open_store(mooncake_pool.master, "key", mooncake_master_url=url, mooncake_master_api_key_file=str(key))
        connection, _ = server.accept()
        with connection:
            connection.settimeout(10)
            assert b"Bearer sk-of-the-master\r\n" in connection.recv(1 << 16)
        store.close()


@in_rounds(3)
def test_without_a_master_opening_fails_at_once_with_the_command_that_helps() -> None:
    (port,) = free_ports(1)
    start_s = time.monotonic()
    with pytest.raises(StoreUnreachable, match="start one with `kvist master`") as caught:
        open_store(f"127.0.0.1:{port}", "n")
    assert caught.value.param == "mooncake_master_addr"
    check_time(time.monotonic() - start_s < 5, "the library's own attempts were waited for")


def test_another_server_in_place_of_the_master_is_refused_in_time(mooncake_library: None) -> None:  # noqa: ARG001
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never answers
        start_s = time.monotonic()
        with pytest.raises(StoreError, match="Mooncake master of the release") as caught:
            open_store(f"127.0.0.1:{server.getsockname()[1]}", "n")
    assert caught.value.param == "mooncake_master_addr"
    assert time.monotonic() - start_s < 25


def test_another_release_of_the_library_is_refused_with_the_command_that_helps(
    mooncake_pool: MooncakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvist.mooncake.engine._process", {})  # as in a new process
    monkeypatch.setattr(requirements, "installed_release", lambda: "0.3.14")
    with pytest.raises(ConfigError, match=r"Mooncake 0.3.14 is installed, but Kvist needs 0.3.13: pip install"):
        open_store(mooncake_pool.master, "n")
