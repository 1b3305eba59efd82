"""The same tokens under another model or another salt are other pages, in every tier, in bytes."""

from __future__ import annotations

from pathlib import Path

from kvist.kv.layout import PageLayout, namespace
from kvist.store.backend import PageStore, StoreContext
from kvist.store.file import FileStore
from kvist.testing.stepped_store import FaultyStore
from tests.kv.byte_engine import PAGE_BYTES, PAGE_SIZE, ByteEngine, RightPages

LAYOUT = PageLayout(num_kv_heads=1, num_layers=1, page_size=PAGE_SIZE, head_dim=2, dtype="float32")
MODEL, OTHER_MODEL = namespace("weights a", LAYOUT), namespace("weights b", LAYOUT)
TOKENS = (5, 6, 7, 8, 9, 10, 11, 12)


def test_another_salt_finds_nothing_in_the_device_pool_nor_in_the_host_tier() -> None:
    engine = ByteEngine(RightPages(), namespace=MODEL)
    assert engine.answer(TOKENS, "tenant") == 0
    assert engine.answer(TOKENS, "other") == 0  # the first one's pages are in both tiers
    engine.evict_device()
    assert engine.answer(TOKENS, "") == 0  # the pages of both salts are in the host tier
    for cache_salt in ("tenant", "other", ""):
        engine.evict_device()
        assert engine.answer(TOKENS, cache_salt) == len(TOKENS)  # each finds its own
    assert engine.cache.totals()["host_loaded_pages"] == 3 * len(TOKENS) / PAGE_SIZE
    engine.check_ledgers()


def test_pages_restored_from_a_folder_are_found_with_their_own_salt_only(tmp_path: Path) -> None:
    right = RightPages()
    engine = ByteEngine(right, namespace=MODEL, folder=tmp_path)
    engine.answer(TOKENS, "tenant")
    engine.kill()
    engine = ByteEngine(right, namespace=MODEL, folder=tmp_path)
    assert engine.answer(TOKENS, "other") == 0
    assert engine.answer(TOKENS, "tenant") == len(TOKENS)
    engine.kill()


def test_a_folder_used_by_two_models_in_turn_restores_no_page_of_the_other(tmp_path: Path) -> None:
    right = RightPages()
    for model in (MODEL, OTHER_MODEL, MODEL):
        engine = ByteEngine(right, namespace=model, folder=tmp_path)
        assert engine.tier.counts().cached == 0
        assert engine.answer(TOKENS) == 0
        engine.kill()


def open_files(model: str, folder: Path) -> PageStore:
    return FileStore(folder, StoreContext(namespace=model, page_bytes=PAGE_BYTES), capacity_bytes=1 << 20)


def get(store: PageStore, digests: list[bytes]) -> list[bytes]:
    into = [memoryview(bytearray(PAGE_BYTES)) for _ in digests]
    return [bytes(page) for page in into[: store.get(digests, into)]]


def test_another_salt_finds_nothing_in_a_store(tmp_path: Path) -> None:
    right = RightPages()
    store = open_files(MODEL, tmp_path)
    for cache_salt in ("tenant", "other"):
        digests = right.digests(MODEL, cache_salt, TOKENS)
        assert (store.exists(digests), get(store, digests)) == (0, [])
        pages = [right.by_digest[digest] for digest in digests]
        assert store.put(digests, [memoryview(page) for page in pages]) == len(pages)
        assert get(store, digests) == pages
    store.close()


def test_two_models_share_a_store_s_folder_and_no_page(tmp_path: Path) -> None:
    """The store itself keeps two models apart, even under equal digests, which never occur."""
    right = RightPages()
    assert not set(right.digests(MODEL, "", TOKENS)) & set(right.digests(OTHER_MODEL, "", TOKENS))
    digests = right.digests(MODEL, "", TOKENS)
    stores = [open_files(model, tmp_path) for model in (MODEL, OTHER_MODEL)]
    stores[0].put(digests, [memoryview(right.by_digest[digest]) for digest in digests])
    assert (stores[1].exists(digests), get(stores[1], digests)) == (0, [])
    nonsense = [bytes([number]) * PAGE_BYTES for number in range(len(digests))]
    stores[1].put(digests, [memoryview(page) for page in nonsense])
    assert get(stores[0], digests) == [right.by_digest[digest] for digest in digests]
    assert get(stores[1], digests) == nonsense
    for store in stores:
        store.close()


def test_an_engine_finds_only_pages_of_its_own_model_and_salt_in_the_store(tmp_path: Path) -> None:
    right = RightPages()

    def start(model: str) -> ByteEngine:
        return ByteEngine(right, namespace=model, store=FaultyStore(model, tmp_path, PAGE_BYTES, num_pages=64))

    def fetched(engine: ByteEngine, cache_salt: str) -> float:
        before = engine.cache.totals()["storage_fetched_pages"]
        engine.submit(TOKENS, cache_salt)
        engine.settle()
        engine.check_bytes()
        engine.close(engine.requests[0])
        return engine.cache.totals()["storage_fetched_pages"] - before

    first = start(MODEL)
    first.answer(TOKENS, "tenant")
    first.settle()
    assert first.cache.totals()["storage_stored_pages"] == len(TOKENS) / PAGE_SIZE
    second, other = start(MODEL), start(OTHER_MODEL)
    assert [fetched(other, cache_salt) for cache_salt in ("tenant", "")] == [0, 0]
    assert [fetched(second, cache_salt) for cache_salt in ("other", "", "tenant")] == [0, 0, len(TOKENS) / PAGE_SIZE]
    for engine in (first, second, other):
        engine.check_ledgers()
        engine.kill()
