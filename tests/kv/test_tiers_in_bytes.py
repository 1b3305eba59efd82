"""All tiers in bytes under any order of calls, with copies that are late, torn or fail, a store that fails, hangs,
misreports and loses pages, kills and damaged files: every page found in any tier holds exactly the bytes that were
computed for it, and every page of each tier is in one state.

test_tiers_machine.py checks the same for the cache's decisions, with copies at once. Here every thread of the movers
can be stopped between two pages, and between a copy and its report, while others continue. Two workers, of one model or
of two, share the store.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvist.kv.tiers.write_policy import WRITE_POLICIES
from kvist.testing.stepped_store import BEHAVIOURS, FaultyStore
from tests.budget import budget
from tests.kv.byte_engine import PAGE_BYTES, ByteEngine, Request, RightPages

NUM_PAGES = 8
SALTS = st.sampled_from(["", "", "", "tenant"])
TOKENS = st.one_of(
    st.lists(st.integers(0, 1), min_size=2, max_size=9).map(tuple),
    st.builds(lambda token_id, length: (token_id,) * length, st.integers(0, 1), st.integers(2, 9)),  # one of few
)


class TiersInBytes(RuleBasedStateMachine):
    @initialize(
        num_host_pages=st.integers(1, 24) | st.just(24),
        num_store_pages=st.sampled_from([60, 60, 60, 3]),
        policy=st.sampled_from(["write_through", "write_through", *WRITE_POLICIES]),
        models=st.sampled_from([("a", "a"), ("a", "a"), ("a", "a"), ("a", "b")]),
    )
    def start(self, num_host_pages: int, num_store_pages: int, policy: str, models: tuple[str, str]) -> None:
        self.right = RightPages()
        self.root = Path(tempfile.mkdtemp(prefix="kvist-test-"))
        self.patches = contextlib.ExitStack()
        for pieces in (
            "kv.tiers.storage.FETCH_PAGES",
            "kv.tiers.store_queue.PIECE_PAGES",
            "store.io_threads.PIECE_PAGES",
        ):
            self.patches.enter_context(mock.patch(f"kvist.{pieces}", 2))
        self.make_store_deterministic()
        logging.disable(logging.CRITICAL)
        self.patches.callback(logging.disable, logging.NOTSET)

        def open_store(number: int) -> FaultyStore:
            return FaultyStore(models[number], self.root / "store", PAGE_BYTES, num_store_pages)

        def open_engine(number: int) -> ByteEngine:
            return ByteEngine(
                self.right,
                namespace=models[number],
                num_pages=NUM_PAGES,
                num_host_pages=num_host_pages,
                policy=policy,
                folder=self.root / f"kept-{number}",
                store=self.stores[number],
            )

        self.open_store, self.open_engine = open_store, open_engine
        self.stores = [open_store(number) for number in range(2)]
        self.engines = [open_engine(number) for number in range(2)]
        self.number = 0  # of the engine that the rules use

    def make_store_deterministic(self) -> None:
        """Fix what the file store takes from the outside: the times by which it evicts, and the secret that names its
        folders. Hypothesis repeats an example and expects the same."""
        times_ns = itertools.count(time.time_ns(), 1_000_000)
        for module in ("file", "disk_budget"):
            self.patches.enter_context(mock.patch(f"kvist.store.{module}.unix_time_ns", new=times_ns.__next__))
        draw = "kvist.page_seals.secret.secrets.token_hex"
        self.patches.enter_context(mock.patch(draw, new=lambda count: "5e" * count))

    @property
    def engine(self) -> ByteEngine:
        return self.engines[self.number]

    @rule()
    def switch_engine(self) -> None:
        self.number = 1 - self.number

    # ------------------------------------------------------------ requests

    def idle(self) -> list[Request]:
        return [request for request in self.engine.requests if request.load_id is None]

    @rule(token_ids=TOKENS, cache_salt=SALTS)
    def admit(self, token_ids: tuple[int, ...], cache_salt: str) -> None:
        self.engine.admit(token_ids, cache_salt)

    @rule(token_ids=TOKENS, cache_salt=SALTS, closes=st.booleans(), evicts=st.booleans())
    def answer(self, token_ids: tuple[int, ...], cache_salt: str, closes: bool, evicts: bool) -> None:
        """Run a whole request at once, except its copies; perhaps evict it from the device pool at once."""
        request = self.engine.admit(token_ids, cache_salt)
        if request is not None and request.load_id is None:
            self.engine.compute(request, len(token_ids))
            if closes:
                self.engine.close(request)
        if evicts:
            self.engine.evict_device()

    @rule(token_ids=TOKENS, cache_salt=SALTS)
    def submit(self, token_ids: tuple[int, ...], cache_salt: str) -> None:
        self.engine.submit(token_ids, cache_salt)

    @precondition(lambda self: self.engine.fetching)
    @rule(data=st.data(), is_aborted=st.booleans())
    def give_up(self, data: st.DataObject, is_aborted: bool) -> None:
        prefetch, _, _ = data.draw(st.sampled_from(self.engine.fetching))
        self.engine.finish_prefetch(prefetch, gives_up=True, is_aborted=is_aborted)

    @rule(
        token_ids=TOKENS,
        cache_salt=SALTS,
        here=st.booleans(),
        behaviour=st.sampled_from((*["works"] * 5, *BEHAVIOURS)),
        damaged_at=st.none() | st.none() | st.none() | st.integers(1, PAGE_BYTES),
        then=st.sampled_from(
            ["", "fetched", "fetched", "fetched", "killed", "given up", "aborted", "slow", "detached"]
        ),
    )
    def repeat_from_the_store(
        self, token_ids: tuple[int, ...], cache_salt: str, here: bool, behaviour: str, damaged_at: int | None, then: str
    ) -> None:
        """Repeat a request whose pages, perhaps damaged, are only in the store."""
        self.ensure_working_store()
        self.leave()
        self.engine.answer(token_ids, cache_salt)
        if not here:
            self.switch_engine()
            self.ensure_working_store()
            self.leave()
        self.engine.cache.flush()
        if damaged_at is not None:
            for path in self.stored_files()[:2]:
                flip(path, -damaged_at)
        self.stores[self.number].behaviour = behaviour
        self.engine.submit(token_ids, cache_salt)
        if then in ("fetched", "killed"):
            self.engine.settle_store()
        elif then:
            self.engine.step_store_until_it_fetches()
        if then == "killed":
            self.kill_and_restart([], fails=False, num_steps=1)
        elif then == "slow":
            self.advance_clock(11.0)
        elif then == "detached":
            self.engine.detach()
        elif then in ("given up", "aborted"):
            for prefetch, _, _ in [*self.engine.fetching]:
                self.engine.finish_prefetch(prefetch, gives_up=True, is_aborted=then == "aborted")

    def ensure_working_store(self) -> None:
        if not self.engine.store_mover.is_attached:
            self.replace_or_detach_store(attached=True)
        self.stores[self.number].behaviour = "works"
        self.advance_clock(6.0)
        self.engine.settle_store()  # a probe closes the breaker

    def stored_files(self) -> list[Path]:
        return sorted((self.root / "store").rglob("*.page"))

    def leave(self) -> None:
        self.engine.settle()
        for request in [*self.engine.requests]:
            self.engine.close(request)

    @rule(token_ids=TOKENS, cache_salt=SALTS)
    def repeat_after_eviction(self, token_ids: tuple[int, ...], cache_salt: str) -> None:
        """Close all requests, evict the device pool, and repeat a request, so that its pages are being loaded."""
        engine = self.engine
        self.leave()
        engine.answer(token_ids, cache_salt)
        engine.evict_device()
        engine.admit(token_ids, cache_salt)

    @precondition(lambda self: self.idle())
    @rule(data=st.data(), more=st.integers(1, 8), more_tokens=st.lists(st.integers(0, 1), max_size=2))
    def compute(self, data: st.DataObject, more: int, more_tokens: list[int]) -> None:
        request = data.draw(st.sampled_from(self.idle()))
        request.token_ids += tuple(more_tokens)
        self.engine.compute(request, more)

    @precondition(lambda self: self.idle())
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.engine.close(data.draw(st.sampled_from(self.idle())))

    @rule(really=st.sampled_from([False, False, True]))
    def flush(self, really: bool) -> None:
        if really:
            self.engine.cache.flush()

    @rule()
    def evict_pages(self) -> None:
        self.engine.evict_device()

    # ------------------------------------------------------------ copies

    @precondition(lambda self: self.engine.loads.busy)
    @rule(num_steps=st.integers(1, 6), fails=st.sampled_from([False, False, True]), delivered=st.booleans())
    def load(self, num_steps: int, fails: bool, delivered: bool) -> None:
        self.steps(self.engine.loads, num_steps, fails, delivered)

    @precondition(lambda self: self.engine.backups.busy)
    @rule(num_steps=st.integers(1, 6), fails=st.sampled_from([False, False, True]), delivered=st.booleans())
    def back_up(self, num_steps: int, fails: bool, delivered: bool) -> None:
        self.steps(self.engine.backups, num_steps, fails, delivered)

    def steps(self, copies: object, num_steps: int, fails: bool, delivered: bool) -> None:
        for number in range(num_steps):
            if copies.busy:  # type: ignore[attr-defined]
                copies.step(fails=fails and number == num_steps - 1)  # type: ignore[attr-defined]
        if delivered:
            self.engine.deliver_reports()

    @rule()
    def settle(self) -> None:
        self.engine.settle()

    # ------------------------------------------------------------ the store

    @precondition(lambda self: self.engine.store_mover.fibers)
    @rule(data=st.data(), num_steps=st.integers(1, 8), delivered=st.booleans())
    def step_a_store_thread(self, data: st.DataObject, num_steps: int, delivered: bool) -> None:
        fibers = self.engine.store_mover.fibers
        busy = [index for index, fiber in enumerate(fibers) if not fiber.is_idle] or range(len(fibers))
        fiber = fibers[data.draw(st.sampled_from(busy))]
        for _ in range(num_steps):
            fiber.step()
        if delivered:
            self.engine.deliver_reports()

    @rule(behaviour=st.sampled_from(BEHAVIOURS))
    def change_store_behaviour(self, behaviour: str) -> None:
        self.stores[self.number].behaviour = behaviour

    @rule(attached=st.sampled_from([True, True, False]))
    def replace_or_detach_store(self, attached: bool) -> None:
        self.engine.detach()
        if attached:
            self.stores[self.number] = self.open_store(self.number)
            self.engine.attach(self.stores[self.number])

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def advance_clock(self, seconds: float) -> None:
        """Advance the clock: calls of the store under way become slow."""
        self.engine.clock.advance(seconds)
        self.engine.deliver_reports()

    @rule(data=st.data(), at=st.integers(0, 1 << 16), how=st.sampled_from(["flip", "cut", "gone"]))
    def damage_a_store_file(self, data: st.DataObject, at: int, how: str) -> None:
        files = self.stored_files()
        if not files:
            return
        path = data.draw(st.sampled_from(files))
        if how == "gone":
            path.unlink()
        elif how == "cut":
            os.truncate(path, at % max(1, path.stat().st_size))
        else:
            flip(path, at)

    # ------------------------------------------------------------ kills and damage

    @rule(
        flips=st.lists(st.tuples(st.sampled_from(["pages", "index"]), st.integers(0, 1 << 16)), max_size=2),
        fails=st.booleans(),
        num_steps=st.integers(1, 4),
    )
    def kill(self, flips: list[tuple[str, int]], fails: bool, num_steps: int) -> None:
        self.kill_and_restart(flips, fails, num_steps)

    def kill_and_restart(self, flips: list[tuple[str, int]], fails: bool, num_steps: int) -> None:
        """Kill the engine, perhaps in the middle of a copy or right after a failed one, and start it again."""
        if fails:
            self.steps(self.engine.backups, num_steps, fails=True, delivered=True)
            self.steps(self.engine.backups, 1, fails=False, delivered=True)
        self.engine.kill()
        for name, at in flips:
            flip(self.root / f"kept-{self.number}" / name, at)
        self.stores[self.number] = self.open_store(self.number)
        self.engines[self.number] = self.open_engine(self.number)

    # ------------------------------------------------------------ the invariants

    @invariant()
    def found_pages_hold_the_right_bytes(self) -> None:
        for engine in getattr(self, "engines", []):
            engine.check_bytes()

    @invariant()
    def every_page_of_each_tier_is_in_one_state(self) -> None:
        for engine in getattr(self, "engines", []):
            engine.check_ledgers()

    def teardown(self) -> None:
        if not hasattr(self, "engines"):
            return
        try:
            for engine, store in zip(self.engines, self.stores, strict=True):
                store.behaviour = "works"
                engine.settle()
                assert engine.fetching == []
                for request in [*engine.requests]:
                    engine.close(request)
                engine.check_bytes()
                engine.check_ledgers()
                engine.cache.flush()
                counts, host = engine.cache.counts(), engine.tier.counts()
                assert (counts.free, host.free) == (counts.total, host.total)
            for number, engine in enumerate(self.engines):
                self.check_store(self.open_store(number), engine.namespace)
        finally:
            for engine in self.engines:
                engine.kill()
            shutil.rmtree(self.root)
            self.patches.close()

    def check_store(self, store: FaultyStore, model: str) -> None:
        """Check that every page left in the store is right."""
        into = memoryview(bytearray(PAGE_BYTES))
        for (namespace, digest), right in self.right.by_name.items():
            if namespace == model and store.get([digest], [into]):
                assert into == right


def test_a_slot_reused_by_a_fetch_after_a_backup_is_recorded_with_the_fetched_page(tmp_path: Path) -> None:
    """The backup thread is stopped at the worst moment: its page is reported, then evicted, and the slot reused."""
    right = RightPages()

    def start(folder: str) -> ByteEngine:
        store = FaultyStore("a", tmp_path / "store", PAGE_BYTES, num_pages=40)
        return ByteEngine(right, namespace="a", num_host_pages=1, folder=tmp_path / folder, store=store)

    first = start("first")
    first.answer((1, 1))
    first.kill()
    engine = start("kept")
    request = engine.admit((0, 0))
    assert request is not None
    engine.compute(request, 2)
    while not engine.backups.afterwards:
        engine.backups.step()
    engine.backups.step()  # the report or the record, whichever the thread does first
    engine.settle_store()
    engine.submit((1, 1))
    engine.settle_store()
    engine.backups.step()  # the other of the two
    engine.kill()
    again = start("kept")
    again.check_bytes()
    again.kill()


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[at % len(content)] ^= 0x10
        path.write_bytes(content)


TiersInBytes.TestCase.settings = settings(max_examples=budget(20, long=1000), stateful_step_count=50)
TestTiersInBytes = pytest.mark.timeout(600)(TiersInBytes.TestCase)  # long, for Hypothesis to shrink a failure
