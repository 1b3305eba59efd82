"""All tiers in bytes under any order of calls, copies that are late, torn or fail, kills and damaged files: a page that
is found anywhere holds exactly the bytes that were computed for it, and every page of each tier is in one state.

test_tiers_machine.py says the same of the cache's decisions with the copies at once. Here a copy takes a step for each
page, the record of a page in the folder comes some time after its report, and others go on in between.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

# Under importlib mode a test module cannot import its neighbour by name.
sys.path.insert(0, str(Path(__file__).parent))
try:
    from byte_engine import ByteEngine, Request, RightPages
finally:
    sys.path.pop(0)

NUM_PAGES = 8
SALTS = st.sampled_from(["", "", "", "tenant"])
TOKENS = st.one_of(
    st.lists(st.integers(0, 1), min_size=2, max_size=9).map(tuple),
    st.builds(lambda token_id, length: (token_id,) * length, st.integers(0, 1), st.integers(2, 9)),  # one of few
)


class TiersInBytes(RuleBasedStateMachine):
    @initialize(
        num_host_pages=st.integers(1, 24),
        policy=st.sampled_from(["write_through", "write_through", "write_through_selective"]),
    )
    def start(self, num_host_pages: int, policy: str) -> None:
        self.right = RightPages()
        self.root = Path(tempfile.mkdtemp(prefix="kvist-test-"))
        self.open: Callable[[], ByteEngine] = lambda: ByteEngine(
            self.right,
            num_pages=NUM_PAGES,
            num_host_pages=num_host_pages,
            policy=policy,
            folder=self.root / "kept",
        )
        self.engine = self.open()

    # ------------------------------------------------------------ requests

    def idle(self) -> list[Request]:
        return [request for request in self.engine.requests if request.load_id is None]

    @rule(token_ids=TOKENS, cache_salt=SALTS)
    def admit(self, token_ids: tuple[int, ...], cache_salt: str) -> None:
        self.engine.admit(token_ids, cache_salt)

    @rule(token_ids=TOKENS, cache_salt=SALTS, closes=st.booleans(), goes=st.booleans())
    def answer(self, token_ids: tuple[int, ...], cache_salt: str, closes: bool, goes: bool) -> None:
        """A whole request at once, but for the copies; perhaps it leaves the device pool at once, too."""
        request = self.engine.admit(token_ids, cache_salt)
        if request is not None and request.load_id is None:
            self.engine.compute(request, len(token_ids))
            if closes:
                self.engine.close(request)
        if goes:
            self.engine.forget_device()

    @rule(token_ids=TOKENS, cache_salt=SALTS)
    def come_back(self, token_ids: tuple[int, ...], cache_salt: str) -> None:
        """Everybody leaves, the device pool forgets, and what is asked for again is under load."""
        engine = self.engine
        engine.settle()
        for request in [*engine.requests]:
            engine.close(request)
        engine.answer(token_ids, cache_salt)
        engine.forget_device()
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
    def others_need_room(self) -> None:
        self.engine.forget_device()

    # ------------------------------------------------------------ copies

    @precondition(lambda self: self.engine.loads.busy)
    @rule(num_steps=st.integers(1, 6), fails=st.sampled_from([False, False, True]), heard=st.booleans())
    def load(self, num_steps: int, fails: bool, heard: bool) -> None:
        self.steps(self.engine.loads, num_steps, fails, heard)

    @precondition(lambda self: self.engine.backups.busy)
    @rule(num_steps=st.integers(1, 6), fails=st.sampled_from([False, False, True]), heard=st.booleans())
    def back_up(self, num_steps: int, fails: bool, heard: bool) -> None:
        self.steps(self.engine.backups, num_steps, fails, heard)

    def steps(self, lane: object, num_steps: int, fails: bool, heard: bool) -> None:
        for number in range(num_steps):
            if lane.busy:  # type: ignore[attr-defined]
                lane.step(fails=fails and number == num_steps - 1)  # type: ignore[attr-defined]
        if heard:
            self.engine.hear()

    @rule()
    def settle(self) -> None:
        self.engine.settle()

    # ------------------------------------------------------------ kills and damage

    @rule(
        flips=st.lists(st.tuples(st.sampled_from(["pages", "index"]), st.integers(0, 1 << 16)), max_size=2),
        fails=st.booleans(),
        num_steps=st.integers(1, 4),
    )
    def is_killed_and_starts_again(self, flips: list[tuple[str, int]], fails: bool, num_steps: int) -> None:
        """Perhaps in the middle of a copy, perhaps right after one that failed."""
        if fails:
            self.steps(self.engine.backups, num_steps, fails=True, heard=True)
            self.steps(self.engine.backups, 1, fails=False, heard=True)
        self.engine.kill()
        for name, at in flips:
            path = self.root / "kept" / name
            content = bytearray(path.read_bytes())
            content[at % len(content)] ^= 0x10
            path.write_bytes(content)
        self.engine = self.open()

    # ------------------------------------------------------------ what must be true

    @invariant()
    def what_is_found_holds_the_right_bytes(self) -> None:
        self.engine.check_bytes()

    @invariant()
    def every_page_of_each_tier_is_in_one_state(self) -> None:
        self.engine.check_ledgers()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        try:
            self.engine.settle()
            for request in [*self.engine.requests]:
                self.engine.close(request)
            self.engine.check_bytes()
            self.engine.cache.flush()
            counts, host = self.engine.cache.counts(), self.engine.tier.counts()
            assert (counts.free, host.free) == (counts.total, host.total)
        finally:
            self.engine.kill()
            shutil.rmtree(self.root)


TiersInBytes.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestTiersInBytes = TiersInBytes.TestCase
