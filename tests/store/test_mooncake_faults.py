"""Master and stores of a real Mooncake pool are killed and stopped: a page is right or a miss, in bounded time."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

import pytest

from kvist.errors import StoreUnreachable
from kvist.mooncake.client import check_master
from kvist.store.mooncake import MooncakeStore
from kvist.testing.mooncake_pool import CLIENT_TTL_S, MooncakePool
from kvist.testing.rounds import check_time, in_rounds
from kvist.testing.waits import wait_until
from tests.store.mooncake_writer import KEYS, open_store
from tests.store.test_mooncake_store import get, put

FIRST_TRY_S = 6.0  # the longest call of a store or master that does not answer


@pytest.fixture
def open_here(breakable_pool: MooncakePool) -> Iterator[Callable[..., MooncakeStore]]:
    """A function that opens a store without pages, or that of a namespace."""
    opened: list[MooncakeStore] = []

    def open_one(namespace: str | None = None, **options: int) -> MooncakeStore:
        opened.append(open_store(breakable_pool.master, namespace or uuid.uuid4().hex, **options))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def timed(call: Callable[[], int]) -> tuple[int, float]:
    start_s = time.monotonic()
    return call(), time.monotonic() - start_s


@in_rounds(3)
def test_with_two_replicas_a_killed_store_costs_no_page_and_less_than_half_a_second(
    breakable_pool: MooncakePool, open_here: Callable[..., MooncakeStore]
) -> None:
    breakable_pool.restore()
    store = open_here(mooncake_replica_num=2)
    assert put(store, KEYS[:64]) == 64
    assert get(store, KEYS[:64]) == 64
    _, before_s = timed(lambda: get(store, KEYS[:64]))
    breakable_pool.stores[0].signal(signal.SIGKILL)
    for _ in range(4):
        num_pages, took_s = timed(lambda: get(store, KEYS[:64]))
        assert num_pages == 64
        check_time(took_s < before_s + 0.5, f"{took_s:.2f} s, and {before_s:.2f} s before the store was killed")
    assert 1 <= store.stats().errors["transfer_failed"] <= 2, "the dead store is not asked again and again"


@in_rounds(3)
def test_with_one_replica_the_pages_of_a_killed_store_are_misses_and_can_be_stored_again(
    breakable_pool: MooncakePool, open_here: Callable[..., MooncakeStore]
) -> None:
    breakable_pool.restore()
    store = open_here()
    put(store, KEYS[:64])
    breakable_pool.stores[0].signal(signal.SIGKILL)
    num_pages, took_s = timed(lambda: get(store, KEYS[:64]))
    assert num_pages < 64
    check_time(took_s < FIRST_TRY_S, f"{took_s:.2f} s")
    wait_until(lambda: store.exists(KEYS[:64]) < 64)  # the master forgets the store
    wait_until(lambda: put(store, KEYS[:64]) == 64)
    assert get(store, KEYS[:64]) == 64
    assert store.stats().num_broken == 0


@pytest.mark.parametrize("num_replicas", [1, 2])
@in_rounds(3)
def test_a_stopped_store_delays_one_read_and_is_then_left_alone(
    breakable_pool: MooncakePool, open_here: Callable[..., MooncakeStore], num_replicas: int
) -> None:
    breakable_pool.restore()
    namespace = uuid.uuid4().hex
    store = open_here(namespace, mooncake_replica_num=num_replicas)
    put(store, KEYS[:64])
    breakable_pool.stores[1].signal(signal.SIGSTOP)
    num_pages, took_s = timed(lambda: get(store, KEYS[:64]))
    assert num_pages == 64 or num_replicas == 1
    check_time(took_s < FIRST_TRY_S, f"{took_s:.2f} s")
    for _ in range(3):
        num_pages, took_s = timed(lambda: get(store, KEYS[:64]))
        assert num_pages == 64 or num_replicas == 1
        check_time(took_s < 1.5, f"{took_s:.2f} s: the stopped store is not read again, which would take two seconds")
    breakable_pool.stores[1].signal(signal.SIGCONT)
    other = open_here(namespace, mooncake_replica_num=num_replicas)
    # The master may still name pages that the store had, and forget them a moment later.
    wait_until(lambda: put(other, KEYS[:64]) == 64 and get(other, KEYS[:64]) == 64)
    assert store.stats().num_broken == 0


def unreachable(call: Callable[[], object]) -> float:
    """Return the seconds after which the call says that the store cannot be reached."""
    start_s = time.monotonic()
    with pytest.raises(StoreUnreachable):
        call()
    return time.monotonic() - start_s


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@in_rounds(3)
def test_without_a_master_every_call_says_so_in_time_and_a_probe_finds_it_again(
    breakable_pool: MooncakePool, open_here: Callable[..., MooncakeStore], how: signal.Signals
) -> None:
    breakable_pool.restore()
    store = open_here()
    put(store, KEYS[:8])
    store.probe()
    breakable_pool.master_process.signal(how)
    calls: Sequence[Callable[[], object]] = (
        lambda: get(store, KEYS[:8]),
        lambda: store.exists(KEYS[:8]),
        lambda: put(store, KEYS[8:16]),
    )
    for call in calls[:2] if how is signal.SIGKILL else calls:
        took_s = unreachable(call)
        check_time(took_s < FIRST_TRY_S, f"{took_s:.2f} s")
    if how is signal.SIGKILL:
        took_s = unreachable(store.probe)
        check_time(took_s < 0.5, f"{took_s:.2f} s: a master that is gone is found by a connection, at once")
        breakable_pool.start_master()
    else:
        breakable_pool.master_process.signal(signal.SIGCONT)
    wait_until(lambda: answers(store))
    wait_until(lambda: put(store, KEYS[:8]) == 8)
    assert get(store, KEYS[:8]) == 8
    assert store.stats().num_broken == 0


def answers(store: MooncakeStore) -> bool:
    try:
        store.probe()
    except StoreUnreachable:
        return False
    return True


def test_pages_of_a_worker_killed_while_it_stores_are_whole_or_missing(
    breakable_pool: MooncakePool, open_here: Callable[..., MooncakeStore], request: pytest.FixtureRequest
) -> None:
    store = open_here(request.node.name)
    argv = [sys.executable, "-m", "tests.store.mooncake_writer", breakable_pool.master, request.node.name]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        try:
            assert writer.stdout.readline() == "writing\n"
            wait_until(lambda: store.exists(KEYS[:1]))
        finally:
            writer.kill()
    time.sleep(CLIENT_TTL_S / 10)
    num_found = sum(store.exists([key]) for key in KEYS[:64])
    num_read = sum(get(store, [key]) for key in KEYS[:64])
    assert 1 <= num_read <= num_found
    assert store.stats().num_broken == 0
    check_master(breakable_pool.master)
    assert put(store, KEYS[100:108]) == 8
    assert get(store, KEYS[100:108]) == 8


@in_rounds(3)
def test_a_put_while_a_store_is_dead_counts_the_leading_pages_and_the_rest_is_stored_later(
    breakable_pool: MooncakePool, open_here: Callable[..., MooncakeStore]
) -> None:
    breakable_pool.restore()
    store = open_here()
    get(store, KEYS[:1])
    breakable_pool.stores[2].signal(signal.SIGKILL)
    num_stored, took_s = timed(lambda: put(store, KEYS[:64]))
    assert num_stored < 64
    check_time(took_s < FIRST_TRY_S, f"{took_s:.2f} s")
    assert get(store, KEYS[:num_stored]) == num_stored
    wait_until(lambda: put(store, KEYS[:64]) == 64)
    assert get(store, KEYS[:64]) == 64
