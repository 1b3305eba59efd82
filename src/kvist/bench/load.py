"""What is asked and in which order. Pure: everything is drawn from the seed, nothing here sends or waits.

Each thing drawn has a generator of its own, keyed by (seed, what, which): a prompt is the same whatever order answers
come in, and however many warm-up requests went before. The scenarios of one run have keys of their own: a prompt that
an earlier one has asked would be answered from the server's cache.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from kvist.bench.config import Span

_json = msgspec.json.Encoder().encode


class Drawn(enum.IntEnum):
    """The second word of a generator's key. Values are part of what a seed means: never renumber."""

    PROMPT = 0
    INPUT_LENGTHS = 1
    OUTPUT_LENGTHS = 2
    ARRIVALS = 3
    TURNS = 4
    ANSWER = 5
    WARM_UP = 6
    PROBE = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Token ids and numbers by seed. Ids are in [vocab_low, vocab_high]."""

    seed: int
    scenario: int = 0  # its place among those of one run
    vocab_low: int
    vocab_high: int

    def generator(self, what: Drawn, *which: int) -> np.random.Generator:
        spawn_key = (self.scenario,) if self.scenario else ()
        return np.random.default_rng(np.random.SeedSequence([self.seed, int(what), *which], spawn_key=spawn_key))

    def token_ids(self, num_tokens: int, what: Drawn, *which: int) -> list[int]:
        ids: list[int] = self.generator(what, *which).integers(self.vocab_low, self.vocab_high + 1, num_tokens).tolist()
        return ids

    def lengths(self, span: Span, count: int, what: Drawn) -> list[int]:
        drawn: list[int] = self.generator(what).integers(span.low, span.high + 1, count).tolist()
        return drawn

    def arrivals_s(self, rate: float, count: int) -> list[float]:
        """Times of a Poisson process, the first at 0: a wait before it would measure nothing."""
        gaps = self.generator(Drawn.ARRIVALS).exponential(1.0 / rate, count)
        times: list[float] = (np.cumsum(gaps) - gaps[0]).tolist()
        return times


class Conversation:
    """One client's token ids, kept as the JSON that is sent: a long history is not encoded again each round."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._pieces: list[bytes] = []

    def append(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            self._pieces.append(_json(token_ids)[1:-1])
            self.num_tokens += len(token_ids)

    def as_json(self) -> bytes:
        return b"[" + b",".join(self._pieces) + b"]"


class Turns:
    """Whose turn it is. A client waits while its request is in flight; the next one is drawn among those that do not.

    Every (client, round) comes up exactly once: as a start, or in the count that a failed `end` returns.
    """

    def __init__(self, *, clients: int, rounds: int, parallel: int, generator: np.random.Generator) -> None:
        self._ready = list(range(clients))  # not waiting, and with rounds left
        self._next_round = [0] * clients
        self._waiting: set[int] = set()
        self._rounds = rounds
        self._parallel = parallel
        self._generator = generator

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> tuple[int, int] | None:
        """(client, round), or None: as many as may be are in flight, or nobody is ready."""
        if not self._ready or len(self._waiting) >= self._parallel:
            return None
        chosen = int(self._generator.integers(len(self._ready)))
        self._ready[chosen], self._ready[-1] = self._ready[-1], self._ready[chosen]
        client = self._ready.pop()
        self._waiting.add(client)
        turn = self._next_round[client]
        self._next_round[client] += 1
        return client, turn

    def end(self, client: int, *, ok: bool) -> range:
        """The rounds that will not be sent because this one failed: without its answer there is nothing to append."""
        self._waiting.remove(client)
        left = range(self._next_round[client], self._rounds)
        if not ok:
            self._next_round[client] = self._rounds
            return left
        if left:
            self._ready.append(client)
        return range(0)
