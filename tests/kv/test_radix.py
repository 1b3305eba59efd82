"""The radix tree against a naive model: a dictionary from whole prefixes to pages, searched from end to end."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from kvist.kv.keys import chain_digest, root_digest
from kvist.kv.radix import Pin, RadixTree
from kvist.testing.page_events import ReplayedPages, short
from tests.budget import budget

Prefix = tuple[str, ...]  # a cache salt, then one letter a page

WORDS = st.text(alphabet="ab", max_size=5)
SALTS = st.sampled_from(["", "salt"])


def keys(word: str) -> list[bytes]:
    return [letter.encode() for letter in word]


@dataclass
class ModelPin:
    pin: Pin
    reached: Prefix
    duplicates: dict[Prefix, int] = field(default_factory=dict)  # oldest first

    def uses(self, prefix: Prefix) -> bool:
        return self.reached[: len(prefix)] == prefix

    def reads(self, prefix: Prefix) -> bool:
        return self.uses(prefix) and prefix not in self.duplicates


class RadixMachine(RuleBasedStateMachine):
    """Find the right answer by a full search over all cached prefixes, their users, and the time of their last use."""

    pins = Bundle("pins")

    @initialize()
    def start(self) -> None:
        self.tree = RadixTree("space")
        self.pages: dict[Prefix, int] = {}
        self.model_pins: list[ModelPin] = []
        self.unused_since: dict[Prefix, int] = {}
        self.time = 0
        self.next_page = 0
        self.replayed = ReplayedPages()

    def longest_cached(self, prefix: Prefix) -> Prefix:
        return max(
            (prefix[:end] for end in range(1, len(prefix) + 1) if end == 1 or prefix[:end] in self.pages), key=len
        )

    def digest(self, prefix: Prefix) -> bytes:
        digest = root_digest("space", prefix[0])
        for letter in prefix[1:]:
            digest = chain_digest(digest, letter.encode())
        return digest

    @rule(target=pins, word=WORDS, salt=SALTS)
    def pin(self, word: str, salt: str) -> ModelPin:
        pin = self.tree.pin(keys(word), salt)
        reached = self.longest_cached((salt, *word))
        assert pin.num_pages == len(reached) - 1
        assert pin.page_ids == [self.pages[reached[:end]] for end in range(2, len(reached) + 1)]
        model_pin = ModelPin(pin, reached)
        self.model_pins.append(model_pin)
        return model_pin

    @rule(model_pin=pins, word=WORDS)
    def extend(self, model_pin: ModelPin, word: str) -> None:
        taken, released, page_ids = [], [], []
        for letter in word:
            page_id, self.next_page = self.next_page, self.next_page + 1
            page_ids.append(page_id)
            prefix = model_pin.reached = (*model_pin.reached, letter)
            readers = [other for other in self.model_pins if other is not model_pin and other.uses(prefix)]
            if prefix in self.pages and readers:
                model_pin.duplicates[prefix] = page_id
                continue
            if prefix in self.pages:
                released.append(self.pages[prefix])
            self.pages[prefix] = page_id
            taken.append(page_id)
        moves = self.tree.extend(model_pin.pin, keys(word), page_ids)
        assert (moves.taken, moves.released) == (taken, released)

    @rule(model_pin=consumes(pins))
    def unpin(self, model_pin: ModelPin) -> None:
        self.model_pins.remove(model_pin)
        self.time += 1
        taken, released = [], []
        for end in range(len(model_pin.reached), 1, -1):
            prefix = model_pin.reached[:end]
            others = [other for other in self.model_pins if other.uses(prefix)]
            if not others:
                self.unused_since[prefix] = self.time
            elif not any(other.reads(prefix) for other in others):
                released.append(self.pages[prefix])
                successor = self.newest_duplicate(prefix)
                self.pages[prefix] = successor.duplicates.pop(prefix)
                taken.append(self.pages[prefix])
        moves = self.tree.unpin(model_pin.pin)
        assert (moves.taken, moves.released) == (taken, released)
        assert list(model_pin.pin.duplicates.values()) == list(model_pin.duplicates.values())

    def newest_duplicate(self, prefix: Prefix) -> ModelPin:
        # Page numbers only grow, so the newest duplicate has the highest.
        return max((pin for pin in self.model_pins if prefix in pin.duplicates), key=lambda pin: pin.duplicates[prefix])

    def unused_leaves(self) -> list[Prefix]:
        return [
            prefix
            for prefix in self.pages
            if not any(pin.uses(prefix) for pin in self.model_pins)
            and not any(other[:-1] == prefix for other in self.pages)
        ]

    @precondition(lambda self: self.unused_leaves())
    @rule()
    def evict(self) -> None:
        victim = min(self.unused_leaves(), key=self.unused_since.__getitem__)
        assert self.tree.evict().page_id == self.pages.pop(victim)

    @rule(word=WORDS, salt=SALTS)
    def match(self, word: str, salt: str) -> None:
        path = self.tree.match(keys(word), salt)
        assert len(path) == len(self.longest_cached((salt, *word))) - 1

    @rule()
    def replay_changes(self) -> None:
        self.replayed.apply(self.tree.changes.take())
        assert self.replayed.pages == {("device", short(self.digest(prefix))) for prefix in self.pages}

    @invariant()
    def tree_holds_what_the_model_holds(self) -> None:
        nodes = {node.digest: node.page_id for node in self.tree.nodes()}
        assert nodes == {self.digest(prefix): page_id for prefix, page_id in self.pages.items()}
        unused = [prefix for prefix in self.pages if not any(pin.uses(prefix) for pin in self.model_pins)]
        assert self.tree.num_evictable == len(unused)

    @invariant()
    def every_used_page_has_a_reader(self) -> None:
        for prefix in self.pages:
            users = [pin for pin in self.model_pins if pin.uses(prefix)]
            assert not users or any(pin.reads(prefix) for pin in users)

    @invariant()
    def a_root_without_pages_or_pins_is_dropped(self) -> None:
        in_use = {prefix[0] for prefix in self.pages} | {pin.reached[0] for pin in self.model_pins}
        assert set(self.tree._roots) == in_use


RadixMachine.TestCase.settings = settings(max_examples=budget(40, long=1000), stateful_step_count=40)
TestRadix = RadixMachine.TestCase


def insert(tree: RadixTree, word: str, first_page_id: int, salt: str = "") -> None:
    pin = tree.pin(keys(word), salt)
    num_cached, num_pages = pin.num_pages, len(word)
    tree.extend(pin, keys(word)[num_cached:], range(first_page_id + num_cached, first_page_id + num_pages))
    tree.unpin(pin)


def test_the_least_recently_used_leaf_is_evicted_first_and_its_prefix_after_it() -> None:
    tree = RadixTree("space")
    insert(tree, "ab", 10)
    insert(tree, "ac", 20)
    assert [tree.evict().page_id for _ in range(3)] == [11, 21, 10]


def test_matching_without_pinning_does_not_postpone_eviction() -> None:
    tree = RadixTree("space")
    insert(tree, "a", 10)
    insert(tree, "b", 20)
    tree.match(keys("a"), "")
    assert tree.evict().page_id == 10


def test_using_a_page_again_postpones_its_eviction() -> None:
    tree = RadixTree("space")
    insert(tree, "a", 10)
    insert(tree, "b", 20)
    insert(tree, "a", 30)
    assert tree.evict().page_id == 20


def test_when_the_last_reader_leaves_the_newest_duplicate_takes_its_place() -> None:
    tree = RadixTree("space")
    first, second, third = (tree.pin([], "") for _ in range(3))
    for pin, page_id in ((first, 10), (second, 20), (third, 30)):
        tree.extend(pin, [b"a"], [page_id])
    moves = tree.unpin(first)
    assert (moves.taken, moves.released) == ([30], [10])
    assert tree.num_evictable == 0
    moves = tree.unpin(third)
    assert (moves.taken, moves.released) == ([20], [30])
    tree.unpin(second)
    assert tree.evict().page_id == 20


def test_pages_stored_and_evicted_between_two_reports_are_in_no_event() -> None:
    tree = RadixTree("space")
    insert(tree, "a", 10)
    tree.evict()
    assert tree.changes.take() == ()
    insert(tree, "a", 10)
    (event,) = tree.changes.take()
    tree.evict()
    insert(tree, "a", 20)
    assert (len(event.stored), event.removed) == (1, ())
    assert tree.changes.take() == ()


def test_a_very_deep_tree_is_built_evicted_and_dropped_without_recursion() -> None:
    tree = RadixTree("space")
    insert(tree, "a" * 50_000, 0)
    assert tree.num_evictable == 50_000
    assert tree.evict().page_id == 49_999
    del tree
