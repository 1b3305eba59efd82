"""Handoffs through the store: the tokens are those of one engine, also if the store or prefill fails."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvist.kv.tiers.prefetch import PrefetchConfig
from kvist.request import Outcome, Role
from kvist.store import STORES
from kvist.store.backend import StoreContext
from kvist.store.config import StorageConfig
from kvist.testing.memory_cluster import MemoryCluster, Stream
from kvist.testing.memory_engine import MemoryEngine
from kvist.testing.memory_store import MemoryStore
from kvist.testing.specs import RequestFields
from tests.budget import budget
from tests.engine.conftest import request_of
from tests.engine.test_storage_tier import file_of, file_store, flip, prompt, start, truncate

LENGTHS = (1, 3, 4, 5, 8, 9, 17, 33, 60)[budget(1, long=0) :: budget(3, long=1)]  # around whole pages of 4 tokens
SAMPLING: dict[str, RequestFields] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "min_p": 0.001, "seed": 12345},
    "shaped": {
        "temperature": 0.9,
        "seed": 7,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.4,
        "repetition_penalty": 1.2,
        "min_tokens": 4,
        "bad_words": ((5, 6), (9,)),
    },
    "logprobs": {"temperature": 0.0, "num_logprobs": 3, "prompt_logprobs": 2},
}


def pair_of(world: MemoryCluster, storage: StorageConfig, **settings: Any) -> tuple[MemoryEngine, MemoryEngine]:
    settings = {"prefetch": PrefetchConfig(), **settings}
    return start(world, storage, role=Role.PREFILL, **settings), start(world, storage, role=Role.DECODE, **settings)


def total(engine: MemoryEngine, name: str) -> float:
    return engine.scheduler.status().totals[name]


def missing(stream: Stream) -> int:
    """Return how many full pages decode had to compute."""
    assert stream.handoff is not None
    return stream.handoff.num_pages_missing


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("write_policy", ["write_through", "write_back"])
def test_one_engine_a_direct_pair_and_a_pair_with_a_store_give_the_same_tokens(
    world: MemoryCluster, tmp_path: Path, sampling: RequestFields, write_policy: str
) -> None:
    one = start(world, StorageConfig())
    direct = pair_of(world, StorageConfig())
    through = pair_of(world, file_store(tmp_path / "pages"), write_policy=write_policy)
    for n in LENGTHS:
        whole = world.answer(one, request_of(f"whole-{n}", prompt(n), **sampling))
        handed = world.submit_pair(*direct, request_of(f"direct-{n}", prompt(n), **sampling))
        stored = world.submit_through_store(*through, request_of(f"store-{n}", prompt(n), **sampling))
        world.run()
        for stream in (handed, stored):
            assert [ended.outcome for ended in stream.ended] == [Outcome.FINISHED] * 2
            assert stream.token_ids == whole.token_ids
            assert stream.finish is whole.finish
            assert sorted(stream.logprobs) == sorted(whole.logprobs)
            assert sorted(stream.prompt_logprobs) == sorted(whole.prompt_logprobs)
            for position, found in whole.logprobs.items():
                assert stream.logprobs[position].logprob == pytest.approx(found.logprob, abs=1e-5)
        done = stored.ended[0].stored
        assert done is not None
        assert done.num_stored == done.num_pages == n // 4
        assert stored.handoff is not None
        assert (stored.handoff.num_pages, stored.handoff.num_pages_missing) == (n // 4, 0)
        assert stored.cached == 0
    assert total(through[0], "store_handoffs_sent") == total(through[1], "store_handoffs_received") == len(LENGTHS)
    assert total(through[1], "store_handoff_missing_pages") == 0
    assert total(through[1], "computed_prompt_tokens") == sum(n % 4 + 1 for n in LENGTHS if n % 4), (
        "alone, a last token is a decode"
    )
    world.check_ledgers()


def test_a_second_turn_is_found_where_it_is(world: MemoryCluster, tmp_path: Path) -> None:
    one, pair = start(world, StorageConfig()), pair_of(world, file_store(tmp_path / "pages"))
    first = world.submit_through_store(*pair, request_of("1", prompt(18)))
    world.run()
    longer = prompt(18) + tuple(first.token_ids) + prompt(7, seed=4)
    expected = world.answer(one, request_of("one", longer)).token_ids
    second = world.submit_through_store(*pair, request_of("2", longer))
    world.run()
    assert second.token_ids == expected
    assert second.handoff is not None
    assert second.handoff.num_pages_reused == (18 + 11) // 4, "decode has the K/V of the first turn, and its answer"
    assert (second.handoff.num_pages, second.handoff.num_pages_missing) == (9 - 7, 0)


def test_equal_prompts_at_once_are_stored_and_loaded(world: MemoryCluster, tmp_path: Path) -> None:
    one, pair = start(world, StorageConfig()), pair_of(world, file_store(tmp_path / "pages"), num_pages=256)
    prompts = [prompt(33)] * 4 + [prompt(33)[:20] + prompt(n, seed=9) for n in (3, 9, 14)]
    expected = [world.answer(one, request_of(f"one-{i}", each)).token_ids for i, each in enumerate(prompts)]
    streams = [world.submit_through_store(*pair, request_of(f"r{i}", each)) for i, each in enumerate(prompts)]
    world.run()
    assert [stream.token_ids for stream in streams] == expected
    assert sum(map(missing, streams)) == 0
    world.check_ledgers()


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_an_answer_that_ends_with_the_first_token_waits_for_no_store(
    world: MemoryCluster, tmp_path: Path, max_tokens: int
) -> None:
    prefill, decode = pair_of(world, file_store(tmp_path / "pages"))
    stream = world.submit_through_store(prefill, decode, request_of("r", prompt(17), max_tokens=max_tokens))
    world.run()
    assert (len(stream.token_ids), len(stream.ended)) == (max_tokens, max_tokens)
    assert (stream.ended[0].stored is None) is (max_tokens == 1)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damaged_pages_are_computed_by_decode(world: MemoryCluster, tmp_path: Path, damage: Any) -> None:
    storage = file_store(tmp_path / "pages")
    expected = world.answer(start(world, StorageConfig()), request_of("one", prompt(33))).token_ids
    prefill, decode = pair_of(world, storage)
    stream = world.submit_through_store(prefill, decode, request_of("r", prompt(33)))
    world.step_until(lambda: stream.ended)
    damage(file_of(tmp_path, prefill, prompt(33), 5))
    world.run()
    assert stream.token_ids == expected
    assert missing(stream) == total(decode, "store_handoff_missing_pages") == 8 - 5
    world.check_ledgers()


def test_without_a_store_at_either_side_decode_computes_the_prompt(world: MemoryCluster, tmp_path: Path) -> None:
    storage, none = file_store(tmp_path / "pages"), StorageConfig()
    expected = world.answer(start(world, none), request_of("one", prompt(33))).token_ids
    for number, (of_prefill, of_decode) in enumerate(((none, none), (storage, none), (none, storage))):
        prefill = start(world, of_prefill, role=Role.PREFILL)
        decode = start(world, of_decode, role=Role.DECODE)
        request = request_of(f"r{number}", (number, *prompt(32)))
        alone = world.answer(start(world, none), request_of(f"one{number}", (number, *prompt(32)))).token_ids
        stream = world.submit_through_store(prefill, decode, request)
        world.run()
        assert stream.token_ids == alone
        assert missing(stream) == 8
        assert total(prefill, "store_handoffs_sent") == (of_prefill is storage)
        assert total(prefill, "store_handoffs_incomplete") == (of_prefill is none)
    assert expected
    world.check_ledgers()


@pytest.mark.parametrize("after", ["first token", "stored"])
def test_a_prefill_that_dies_costs_time_and_no_token(world: MemoryCluster, tmp_path: Path, after: str) -> None:
    expected = world.answer(start(world, StorageConfig()), request_of("one", prompt(33))).token_ids
    prefill, decode = pair_of(world, file_store(tmp_path / "pages"))
    stream = world.submit_through_store(prefill, decode, request_of("r", prompt(33)))
    world.step_until(lambda: stream.tokens if after == "first token" else stream.ended)
    world.kill(prefill)
    world.run()
    assert stream.token_ids == expected
    assert after == "first token" or missing(stream) == 0
    world.check_ledgers()


class SlowStore(MemoryStore):
    """A store in memory whose `get` and `put` wait for `may_get` and `may_put`."""

    may_get: threading.Event
    may_put: threading.Event
    fails = False

    def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> int:
        assert self.may_get.wait(120)
        return super().get(keys, into)

    def put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        assert self.may_put.wait(120)
        return 0 if self.fails else super().put(keys, pages)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowStore:
    """The one store behind every file store of the test."""
    store = SlowStore(StoreContext(namespace="n", page_bytes=4 * 2 * 2 * 4 * 8 * 2))
    store.may_get, store.may_put = threading.Event(), threading.Event()
    store.may_get.set()
    store.may_put.set()
    monkeypatch.setitem(STORES, "file", dataclasses.replace(STORES["file"], make=lambda _given, _context: store))
    monkeypatch.setattr(store, "close", lambda: None)  # the store outlives the engines of this test
    return store


def test_a_store_that_does_not_store_in_time_delays_decode_by_the_timeout(
    world: MemoryCluster, tmp_path: Path, slow: SlowStore
) -> None:
    expected = world.answer(start(world, StorageConfig()), request_of("one", prompt(33))).token_ids
    prefill, decode = pair_of(world, file_store(tmp_path))
    slow.may_put.clear()
    stream = world.submit_through_store(prefill, decode, request_of("r", prompt(33)))
    world.step_until(lambda: stream.tokens)
    begun_s = world.clock.now_s()
    world.step_until(lambda: len(stream.tokens) > 1, step_s=0.05)
    assert 5.0 <= world.clock.now_s() - begun_s <= 5.0 + 1.0
    assert stream.ended[0].outcome is Outcome.FINISHED
    assert stream.ended[0].stored is not None
    assert stream.ended[0].stored.num_stored == 0
    slow.may_put.set()
    world.run()
    assert (stream.token_ids, missing(stream)) == (expected, 8)
    assert total(prefill, "store_handoffs_incomplete") == 1
    world.check_ledgers()


def test_a_store_that_fails_is_not_waited_for(world: MemoryCluster, tmp_path: Path, slow: SlowStore) -> None:
    expected = world.answer(start(world, StorageConfig()), request_of("one", prompt(33))).token_ids
    prefill, decode = pair_of(world, file_store(tmp_path))
    slow.fails = True
    stream = world.submit_through_store(prefill, decode, request_of("r", prompt(33)))
    world.step_until(lambda: len(stream.tokens) > 1)
    assert stream.ended[0].stored is not None
    assert (stream.ended[0].stored.num_stored, stream.ended[0].stored.duration_s < 2) == (0, True)
    world.run()
    assert stream.token_ids == expected


def test_decode_waits_for_a_slow_store_no_longer_than_the_prefetch_timeout(
    world: MemoryCluster, tmp_path: Path, slow: SlowStore
) -> None:
    expected = world.answer(start(world, StorageConfig()), request_of("one", prompt(33))).token_ids
    prefill, decode = pair_of(world, file_store(tmp_path))
    slow.may_get.clear()
    stream = world.submit_through_store(prefill, decode, request_of("r", prompt(33)))
    world.step_until(lambda: stream.ended)
    begun_s = world.clock.now_s()
    world.step_until(lambda: len(stream.tokens) > 1, step_s=0.05)
    assert world.clock.now_s() - begun_s <= 1.0 + 1.0, "1 s, and 0.25 s for each 1000 tokens"
    slow.may_get.set()
    world.run()
    assert (stream.token_ids, missing(stream)) == (expected, 8)
    assert total(decode, "prefetch_timeouts") == 1
    world.check_ledgers()


@pytest.mark.parametrize("moment", ["computing", "storing", "loading"])
def test_an_abort_at_any_moment_ends_the_request_once(
    world: MemoryCluster, tmp_path: Path, slow: SlowStore, moment: str
) -> None:
    prefill, decode = pair_of(world, file_store(tmp_path))
    (slow.may_put if moment == "storing" else slow.may_get).clear()
    stream = world.submit_through_store(prefill, decode, request_of("r", prompt(33)))
    if moment != "computing":
        world.step_until(lambda: stream.tokens if moment == "storing" else stream.ended)
        stream.then = decode if moment == "loading" and stream.num_submits == 1 else None
    else:
        world.step()
        stream.then = None
    world.step()
    world.abort("r")
    world.step_until(lambda: not stream.waits_for)
    assert stream.ended[-1].outcome is Outcome.ABORTED
    slow.may_put.set()
    slow.may_get.set()
    world.run()
    world.check_ledgers()
