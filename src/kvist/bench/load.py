"""Prompts, lengths, arrivals and turns. Pure: everything is drawn from the seed, nothing here sends or waits.

Each drawn value has its own generator, keyed by (seed, kind, indices): a prompt depends neither on the order of the
answers nor on the number of warm-up requests. Each scenario of a run has its own keys: a prompt that an earlier
scenario has sent would be answered from the server's cache.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from kvist.bench.config import LengthRange

_json = msgspec.json.Encoder().encode


class DrawKind(enum.IntEnum):
    """The second word of a generator's key. Never renumber: the values decide which prompts belong to a seed."""

    PROMPT = 0
    INPUT_LENGTHS = 1
    OUTPUT_LENGTHS = 2
    ARRIVALS = 3
    TURNS = 4
    ANSWER = 5
    WARM_UP = 6
    PROBE = 7
    LONG_INPUT_LENGTHS = 8
    LONG_OUTPUT_LENGTHS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Draws token ids and numbers by seed. Token ids are in [vocab_low, vocab_high], both included."""

    seed: int
    scenario: int = 0  # its index in the run
    vocab_low: int
    vocab_high: int

    def generator(self, what: DrawKind, *which: int) -> np.random.Generator:
        spawn_key = (self.scenario,) if self.scenario else ()
        return np.random.default_rng(np.random.SeedSequence([self.seed, int(what), *which], spawn_key=spawn_key))

    def token_ids(self, num_tokens: int, what: DrawKind, *which: int) -> list[int]:
        ids: list[int] = self.generator(what, *which).integers(self.vocab_low, self.vocab_high + 1, num_tokens).tolist()
        return ids

    def lengths(self, span: LengthRange, count: int, what: DrawKind) -> list[int]:
        drawn: list[int] = self.generator(what).integers(span.low, span.high + 1, count).tolist()
        return drawn

    def arrivals_s(self, rate: float, count: int) -> list[float]:
        """Return the times of a Poisson process. The first is 0: a wait before it would measure nothing."""
        gaps = self.generator(DrawKind.ARRIVALS).exponential(1.0 / rate, count)
        times: list[float] = (np.cumsum(gaps) - gaps[0]).tolist()
        return times

    def arrivals_before_s(self, rate: float, end_s: float) -> list[float]:
        """Return the times of the same process before `end_s`: at least the first, at 0."""
        count = 64
        while (times := self.arrivals_s(rate, count))[-1] < end_s:
            count *= 2
        return times[: max(1, bisect.bisect_left(times, end_s))]


class TokenHistory:
    """The token ids of one client, kept as JSON, so that a long history is not encoded again in each round."""

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
    """Chooses the next client. A client waits while its request is in flight; the next one is drawn among the others.

    Every (client, round) occurs exactly once: returned by `start`, or in the range that a failed `end` returns.
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
        """Return (client, round), or None when `parallel` requests are in flight or no client is ready."""
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
        """End the client's request. Return the rounds that cannot be sent after a failure: they lack its answer."""
        self._waiting.remove(client)
        left = range(self._next_round[client], self._rounds)
        if not ok:
            self._next_round[client] = self._rounds
            return left
        if left:
            self._ready.append(client)
        return range(0)
