"""The nodes of a pool are restarted, killed, drained and added; its pages are all there again, and none is wrong."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from kvist import __version__, cli
from kvist.store.mooncake import MooncakeStore
from kvist.testing.waits import wait_until
from kvist.upgrade.view import HttpClusterView
from tests.nodes.conftest import Pool, Server
from tests.store.mooncake_writer import KEYS, PAGE_BYTES, open_store, page_of

pytestmark = pytest.mark.timeout(300)  # of three restarts on a busy machine, each with a start of Python

NUM_PAGES = 60
SMALL_GB = 0.02
WORKERS_KEYS = KEYS[:16]
TTL_S = 2  # of conftest.py's master


def names(prefix: str, num: int = NUM_PAGES) -> list[str]:
    return [f"{prefix}-{index}" for index in range(num)]


def restart_in_order(store: Server) -> None:
    assert store.stop() == 0, store.log()
    store.start()


def restart_at_once_after_a_kill(store: Server) -> None:
    store.kill()
    store.start()


def restart_some_time_after_a_kill(store: Server) -> None:
    store.kill()
    time.sleep(TTL_S + 2)
    store.start()


RESTARTS = {
    "sigterm": restart_in_order,
    "fast sigkill": restart_at_once_after_a_kill,
    "slow sigkill": restart_some_time_after_a_kill,
}


def test_a_drained_store_can_be_killed_and_a_new_one_joins(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    drained = pool.stores[-1]
    in_memory, on_ssd = names("memory"), names("ssd")
    assert pool.client.put(on_ssd, store=drained.name) == NUM_PAGES
    restart_in_order(drained)  # now these pages are on its SSD only
    drained.wait_ready()
    assert pool.client.put(in_memory, store=drained.name) == NUM_PAGES
    pages = [*in_memory, *on_ssd]
    [run] = [one.client_id for one in pool.admin.segments() if one.segment_name == drained.name]
    wait_until(lambda: len(pool.admin.only_on_disk_of(run, on_ssd)) == len(on_ssd), pool.status)
    assert pool.client.check(in_memory)["right"] == NUM_PAGES  # they have leases now, and move all the same
    assert cli.main(["store", "drain", drained.url, "--timeout-s=60"]) == 0, drained.log()
    assert "Stop the store now" in capsys.readouterr().out
    assert not drained.is_ready()
    drained.kill()
    wait_until(lambda: all(one.segment_name != drained.name for one in pool.admin.segments()), pool.status)
    assert pool.client.check(pages) == {"right": len(pages), "wrong": 0, "missing": 0}

    pool.stores[-1] = joined = pool.new_store(3)
    joined.start()
    joined.wait_ready()
    assert pool.client.put(names("joined"), store=joined.name) == NUM_PAGES
    assert pool.admin.pool_status().stores[joined.name].used_bytes > 0


@pytest.fixture(scope="module")
def workers_store(pool: Pool) -> Iterator[MooncakeStore]:
    """A worker's store on the pool, which has put all `WORKERS_KEYS`."""
    store = open_store(pool.master_addr, "nodes")
    assert store.put(WORKERS_KEYS, [page_of(key) for key in WORKERS_KEYS]) == len(WORKERS_KEYS)
    yield store
    store.close()


@pytest.fixture(scope="module")
def restarted(pool: Pool, workers_store: MooncakeStore) -> dict[str, dict[str, int]]:
    """Restart each of the three stores in its own way, at the same time; return what became of each one's pages."""
    pool.wait_on_ssd(workers_store.names(WORKERS_KEYS))
    for how, store in zip(RESTARTS, pool.stores, strict=True):
        assert pool.client.put(names(how), store=store.name) == NUM_PAGES
    pool.wait_on_ssd([name for how in RESTARTS for name in names(how)])
    threads = [
        threading.Thread(target=restart, args=(store,))
        for restart, store in zip(RESTARTS.values(), pool.stores, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in pool.stores:
        store.wait_ready()
    wait_until(lambda: pool.admin.pool_status().num_keys >= len(RESTARTS) * NUM_PAGES * 0.99, pool.status)
    time.sleep(TTL_S)  # the master forgets the earlier runs now, and no page with them
    return {how: pool.client.check(names(how)) for how in RESTARTS}


@pytest.mark.parametrize("how", RESTARTS)
def test_a_restarted_store_brings_its_pages_back(restarted: dict[str, dict[str, int]], pool: Pool, how: str) -> None:
    del pool
    found = restarted[how]
    assert found["wrong"] == 0
    assert found["right"] >= NUM_PAGES * 0.99
    if how == "sigterm":
        assert found["right"] == NUM_PAGES


def test_pages_that_only_an_ssd_has_are_hits_of_a_worker_with_their_own_bytes(
    restarted: dict[str, dict[str, int]], pool: Pool, workers_store: MooncakeStore
) -> None:
    assert restarted
    names = workers_store.names(WORKERS_KEYS)
    on_ssd = [page.key for one in pool.admin.segments() for page in pool.admin.only_on_disk_of(one.client_id, names)]
    assert sorted(on_ssd) == sorted(names), "every store has been restarted: its memory is empty"
    into = [memoryview(bytearray(PAGE_BYTES)) for _ in WORKERS_KEYS]
    assert workers_store.get(WORKERS_KEYS, into) == len(WORKERS_KEYS)
    assert into == [page_of(key) for key in WORKERS_KEYS]
    assert workers_store.stats().num_broken == 0


def test_a_page_that_a_worker_reads_often_is_copied_to_more_stores(pool: Pool, workers_store: MooncakeStore) -> None:
    hot = KEYS[100:101]
    assert workers_store.put(hot, [page_of(hot[0])]) == 1
    before = pool.admin.pool_status().num_hot_copies
    into = [memoryview(bytearray(PAGE_BYTES))]

    def is_copied() -> bool:
        assert workers_store.get(hot, into) == 1
        assert into == [page_of(hot[0])]
        return pool.admin.pool_status().num_hot_copies > before

    wait_until(is_copied, pool.status)
    (name,) = workers_store.names(hot)
    replicas = workers_store._client.replicas([name])[name]
    assert replicas is not None
    assert len({session for session, _ in replicas}) > 1


def test_a_pool_whose_stores_are_restarted_one_by_one_loses_nothing_that_is_put_meanwhile(pool: Pool) -> None:
    written: list[str] = []
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            name = f"rolling-{len(written)}"
            if pool.client.put([name]):
                written.append(name)
            time.sleep(0.05 + 0.004 * len(written))  # few pages also on a busy machine, where restarts take minutes

    writing = threading.Thread(target=write)
    writing.start()
    for store in pool.stores:
        restart_in_order(store)
        store.wait_ready()
    done.set()
    writing.join()
    found: dict[str, int] = {}

    def is_whole() -> bool:
        found.update(pool.client.check(written))
        return found["missing"] == 0

    wait_until(is_whole, lambda: f"{found} {pool.status()}")
    assert found == {"right": len(written), "wrong": 0, "missing": 0}


def test_a_master_that_is_killed_or_restarted_has_all_pages_again(pool: Pool) -> None:
    pages = names("master")
    assert pool.client.put(pages) == NUM_PAGES
    pool.wait_on_ssd(pages)
    pool.master.kill()  # takes mooncake_master with it: its port is free at once
    pool.master.start()
    pool.master.wait_ready()
    wait_until(lambda: pool.client.check(pages)["missing"] == 0, pool.status)
    assert pool.client.check(pages) == {"right": NUM_PAGES, "wrong": 0, "missing": 0}
    for store in pool.stores:
        store.wait_ready()


def test_an_ssd_keeps_its_limit_and_no_key_stays_without_its_bytes(pool: Pool) -> None:
    store, pages = pool.new_store(4, ssd_gb=SMALL_GB), names("limit", 2 * NUM_PAGES)
    pool.stores.append(store)
    store.start()
    store.wait_ready()
    folder = pool.folder / "ssd-4" / "file_per_key_dir"
    assert pool.client.put(pages, store=store.name) == len(pages)
    newest = {f"default_{pages[-1]}"}

    def sizes() -> dict[str, int]:
        return {path.name: path.stat().st_size for path in folder.glob("*/*/*")}

    def is_settled() -> bool:
        if "kvist:store_ssd_removed_pages_total 0.0" in store.get("/metrics").text:
            return False
        with contextlib.suppress(FileNotFoundError):
            return newest <= sizes().keys() and sum(sizes().values()) <= SMALL_GB * 1e9
        return False

    wait_until(is_settled, store.log)
    found = pool.client.check(pages)
    assert found["wrong"] == 0
    assert 0 < found["missing"] < len(pages)
    assert pool.client.put(pages[:10], store=store.name) == 10
    assert pool.client.check(pages[:10])["right"] == 10


def test_nodes_show_their_state(pool: Pool) -> None:
    for node in (pool.master, pool.stores[0]):
        assert HttpClusterView().server(node.url).version == __version__
    assert "kvist:master_up 1.0" in pool.master.get("/metrics").text
    assert "master_key_count" in pool.master.get("/metrics").text
    text = pool.stores[0].get("/metrics").text
    assert 'kvist:store_state{state="serving"} 1.0' in text
    assert pool.master.get("/api/v1/remove_all").status_code == httpx.codes.NOT_FOUND  # not passed on
    status = pool.admin.pool_status()
    assert status.num_stores >= len(pool.stores)
    assert status.capacity_bytes == sum(share.capacity_bytes for share in status.stores.values())
