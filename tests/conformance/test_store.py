"""The guarantees of every store of the storage tier.

The Mooncake store runs against a real master and a real store process; its pool, which all tests share, evicts pages
itself, so the guarantees about a size limit are those of the other stores."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvist.door import Door, Given
from kvist.errors import ConfigError
from kvist.kv.keys import page_digests
from kvist.store import STORES
from kvist.store.backend import PageStore, StoreContext, StoreOptions
from kvist.testing.memory_store import MEMORY_STORE
from tests.budget import budget

PAGE_BYTES = 1000  # not a multiple of anything
KEYS = page_digests(range(64), 1, "conformance")


ALL_STORES: Door[[StoreContext], PageStore] = {**STORES, "memory": MEMORY_STORE}
# The options of a store in the test's folder that holds this many bytes, and the bytes that it keeps beside each page.
OPTIONS: dict[str, tuple[Callable[[Path, float], Given], int]] = {
    "file": (lambda folder, num_bytes: {"path": str(folder), "size": num_bytes / 1e9}, 4096),
    "memory": (lambda _, num_bytes: {"size": num_bytes / 1e9}, 0),
    "mooncake": (lambda _, _num_bytes: {"mooncake_master_addr": POOL["master"]}, 0),
}
POOL: dict[str, str] = {}  # the address of the pool's master, set by the fixture
OUTLIVES_ITS_PROCESS = {"file", "mooncake"}
LIMITED = [kind for kind in ALL_STORES if kind != "mooncake"]  # the store itself keeps a size limit


class Place:
    """The place of one test's stores, and the needs of this kind of store."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        self.path = path
        self._opened: list[PageStore] = []

    def open(self, num_pages: int = 32, namespace: str = "model a") -> PageStore:
        options, num_more_bytes = OPTIONS[self.kind]
        given = options(self.path, num_pages * (PAGE_BYTES + num_more_bytes))
        context = StoreContext(namespace=f"{namespace} of {self.path}", page_bytes=PAGE_BYTES)
        store = ALL_STORES[self.kind].make(given, context)
        self._opened.append(store)
        return store

    def an_hour_passes(self) -> None:
        for path in self.path.rglob("*.page"):
            used_ns = path.stat().st_mtime_ns - 3600 * 10**9
            os.utime(path, ns=(used_ns, used_ns))

    def close(self) -> None:
        for store in self._opened:
            store.close()


@pytest.fixture(params=ALL_STORES)
def kind(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    if request.param == "mooncake":
        POOL["master"] = request.getfixturevalue("mooncake_pool").master
    return request.param


limited = pytest.mark.parametrize("kind", LIMITED, indirect=True)


@pytest.fixture
def place(kind: str, tmp_path: Path) -> Iterator[Place]:
    made = Place(kind, tmp_path)
    yield made
    made.close()


def page_of(key: bytes) -> memoryview:
    """Return the page of `key`: random bytes, always the same for one key."""
    return memoryview(np.random.default_rng(list(key)).bytes(PAGE_BYTES))


def buffers(num_pages: int) -> list[memoryview]:
    return [memoryview(bytearray(PAGE_BYTES)) for _ in range(num_pages)]


def put(store: PageStore, keys: Sequence[bytes]) -> int:
    return store.put(keys, [page_of(key) for key in keys])


def get(store: PageStore, keys: Sequence[bytes]) -> int:
    """Call `store.get` and check every page that it counts as read."""
    into = buffers(len(keys))
    num_hits = store.get(keys, into)
    for key, page in zip(keys[:num_hits], into, strict=False):
        assert page == page_of(key)
    return num_hits


def test_get_returns_only_pages_that_were_put(place: Place) -> None:
    store = place.open()
    assert (store.exists(KEYS[:3]), get(store, KEYS[:3])) == (0, 0)
    assert put(store, KEYS[:3]) == 3
    assert (store.exists(KEYS[:5]), get(store, KEYS[:5])) == (3, 3)


def test_an_empty_list_of_keys_gives_zero_pages(place: Place) -> None:
    store = place.open()
    assert (store.exists([]), store.get([], []), store.put([], [])) == (0, 0, 0)


def test_only_leading_pages_count(place: Place) -> None:
    store = place.open()
    put(store, [KEYS[0], KEYS[2]])
    assert (store.exists(KEYS[:3]), get(store, KEYS[:3])) == (1, 1)
    assert (store.exists(KEYS[1:3]), get(store, KEYS[1:3])) == (0, 0)


def test_a_page_is_read_straight_into_a_row_of_an_array(place: Place) -> None:
    store = place.open()
    pool = np.zeros((4, PAGE_BYTES), np.uint8)
    pool[1] = np.frombuffer(page_of(KEYS[0]), np.uint8)
    assert store.put([KEYS[0]], [pool[1].data]) == 1
    assert store.get([KEYS[0]], [pool[3].data]) == 1
    np.testing.assert_array_equal(pool[3], pool[1])
    assert not pool[2].any()


def test_a_stored_key_is_not_written_again(place: Place) -> None:
    store = place.open()
    put(store, KEYS[:2])
    assert store.put(KEYS[:2], buffers(2)) == 2
    assert get(store, KEYS[:2]) == 2  # the bytes of the first put
    assert store.stats().num_written == 2


def test_pages_of_another_namespace_are_misses(place: Place) -> None:
    put(place.open(namespace="model a"), KEYS[:2])
    other = place.open(namespace="model b")
    assert (other.exists(KEYS[:2]), get(other, KEYS[:2])) == (0, 0)


@limited
def test_the_least_recently_used_page_is_evicted_first(place: Place) -> None:
    store = place.open(num_pages=3)
    for key in KEYS[:3]:
        put(store, [key])
    place.an_hour_passes()
    assert get(store, [KEYS[0]]) == 1
    assert put(store, [KEYS[1]]) == 1  # the page is stored already: this counts as a use
    assert put(store, [KEYS[3]]) == 1
    assert [store.exists([key]) for key in KEYS[:4]] == [1, 1, 0, 1]
    assert store.stats().num_evicted == 1


@limited
@pytest.mark.parametrize("is_read", [False, True])
def test_the_last_page_of_a_call_is_evicted_first(place: Place, is_read: bool) -> None:
    store = place.open(num_pages=4)
    put(store, KEYS[:4])
    if is_read:
        place.an_hour_passes()
        get(store, KEYS[:4])
    put(store, KEYS[10:12])
    assert store.exists(KEYS[:4]) == 2
    assert store.exists(KEYS[10:12]) == 2


@limited
def test_the_first_pages_of_a_put_that_does_not_fit_are_stored(place: Place) -> None:
    store = place.open(num_pages=3)
    put(store, KEYS[20:22])
    assert put(store, KEYS[:5]) == 3
    assert store.exists(KEYS[:5]) == 3
    assert store.stats().num_refused == 1


@limited
def test_a_lost_head_is_stored_again_in_place_of_the_tail(place: Place) -> None:
    store = place.open(num_pages=3)
    put(store, KEYS[1:4])
    assert put(store, KEYS[:4]) == 3
    assert store.exists(KEYS[:4]) == 3


def test_the_counters_add_up(place: Place) -> None:
    store = place.open()
    put(store, KEYS[:2])
    get(store, KEYS[:5])
    get(store, KEYS[1:2])
    stats = store.stats()
    assert (stats.num_written, stats.num_hits, stats.num_misses, stats.num_broken) == (2, 3, 3, 0)
    assert stats.stored_bytes >= 2 * PAGE_BYTES
    assert stats.errors == {}


def test_after_close_nothing_is_stored(place: Place) -> None:
    store = place.open()
    store.close()
    assert put(store, KEYS[:2]) == 0
    assert store.exists(KEYS[:2]) == 0
    store.close()


def test_threads_share_a_store(place: Place) -> None:
    store = place.open(num_pages=24)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(60):
                first = int(rng.integers(0, 40))
                keys = KEYS[first : first + 8]
                assert put(store, keys) == 8
                get(store, keys)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == []
    if place.kind in LIMITED:
        assert sum(store.exists([key]) for key in KEYS) <= 24 + len(threads)  # one extra page per writer is allowed
    assert store.stats().errors == {}


ranges = st.tuples(st.integers(0, 12), st.integers(0, 6)).map(lambda pair: KEYS[pair[0] : pair[0] + pair[1]])


@settings(max_examples=budget(15, long=300), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from(["put", "get", "reopen"]), ranges), max_size=25))
def test_pages_are_right_and_the_cap_holds_under_any_order_of_calls(
    kind: str, steps: list[tuple[str, list[bytes]]]
) -> None:
    def stored(store: PageStore) -> list[int]:
        return [store.exists([key]) for key in KEYS[:19]]

    with tempfile.TemporaryDirectory() as folder:
        place = Place(kind, Path(folder))
        store = place.open(num_pages=5)
        for step, keys in steps:
            before = stored(store)
            if step == "put":
                assert store.exists(keys) <= put(store, keys) == store.exists(keys) >= min(len(keys), 5)
            elif step == "get":
                assert get(store, keys) == store.exists(keys)
                assert stored(store) == before
            elif kind in OUTLIVES_ITS_PROCESS:
                store = place.open(num_pages=5)
                assert stored(store) == before
            assert kind not in LIMITED or sum(stored(store)) <= 5
        place.close()


def test_every_store_of_the_door_is_tested_here() -> None:
    assert set(OPTIONS) == set(ALL_STORES)


@limited
def test_a_store_too_small_for_a_page_is_refused(kind: str, tmp_path: Path) -> None:
    given = OPTIONS[kind][0](tmp_path, PAGE_BYTES - 1)
    with pytest.raises(ConfigError, match="smaller than one page") as caught:
        ALL_STORES[kind].make(given, StoreContext(namespace="n", page_bytes=PAGE_BYTES))
    assert caught.value.param in given


def test_options_describe_their_store_and_resolve_to_themselves(kind: str, tmp_path: Path) -> None:
    given = OPTIONS[kind][0](tmp_path, 1e9)
    options: StoreOptions = ALL_STORES[kind].options(**given)
    resolved = options.resolved()
    assert resolved == resolved.resolved() == options.with_request(given, roots=[str(tmp_path)])
    assert f"{kind} store" in str(resolved)
