"""Limits how many generations the gateway has open at once: in total, for each API key, and for each caller.

Admission has no queue: a request over the limit is refused at once, with an estimate of when places will be free. The
last eighth of the places is reserved for callers below their fair share, so that a flood from one caller leaves room
for others. A caller here is an API key and a host; connections are not counted, because a client can open any number.
The share of a caller is proportional to the weight of its API key.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from kvist.clock import Clock
from kvist.errors import Overloaded
from kvist.fairness import CallerPath, weight_of
from kvist.metrics import GatewayMetrics
from kvist.service_time import ServiceTime, retry_after_s

_RESERVE_SHARE = 8


class Admission:
    """Mutable; owned by the event loop. The number of open generations is kept in the metrics."""

    def __init__(self, *, limit: int, metrics: GatewayMetrics, clock: Clock, limit_per_key: int | None = None) -> None:
        self._limit = limit
        self._limit_per_key = limit_per_key
        self._metrics = metrics
        self._clock = clock
        self._open: Counter[tuple[str, str]] = Counter()  # by caller; callers without an open generation are absent
        self._open_of_key: Counter[str] = Counter()
        self._service_time = ServiceTime()

    def check(self, caller: CallerPath, num_choices: int) -> None:
        """Raise `Overloaded`, which names the limit, when `num_choices` more generations do not fit."""
        self._check_key(caller[0], num_choices)
        num_open = self._metrics.num_requests
        num_after = num_open + num_choices
        if num_after > self._limit:
            problem = f"{num_open} generations are open, and {num_choices} more would exceed the limit of {self._limit}"
        elif num_after > self._limit - self._limit // _RESERVE_SHARE and self._exceeds_share(caller, num_choices):
            problem = (
                f"{self._open[caller[:2]]} of the {num_open} open generations are yours, and the last of the "
                f"{self._limit} places are reserved for other callers"
            )
        else:
            return
        wait_s = retry_after_s(self._service_time.mean_s, num_ahead=num_choices, num_served=num_open)
        raise Overloaded(f"{problem} (--max-concurrent-requests)", retry_after_s=wait_s)

    def _check_key(self, key: str, num_choices: int) -> None:
        num_open, limit = self._open_of_key[key], self._limit_per_key
        if limit is None or num_open + num_choices <= limit:
            return
        wait_s = retry_after_s(self._service_time.mean_s, num_ahead=num_choices, num_served=num_open)
        raise Overloaded(
            f"{num_open} generations of your API key are open, and {num_choices} more would exceed the limit of "
            f"{limit} for one key (--max-inflight-per-key)",
            retry_after_s=wait_s,
        )

    @contextlib.contextmanager
    def reserve(self, caller: CallerPath, num_choices: int) -> Iterator[None]:
        """Hold `num_choices` places for the body of the `with`, or raise `Overloaded` at once."""
        self.check(caller, num_choices)
        began_s, key = self._clock.now_s(), caller[:2]
        self._metrics.num_requests += num_choices
        self._open[key] += num_choices
        self._open_of_key[caller[0]] += num_choices
        try:
            yield
        finally:
            self._metrics.num_requests -= num_choices
            self._open[key] -= num_choices
            if not self._open[key]:
                del self._open[key]
            self._open_of_key[caller[0]] -= num_choices
            if not self._open_of_key[caller[0]]:
                del self._open_of_key[caller[0]]
            self._service_time.add(self._clock.now_s() - began_s)

    def _exceeds_share(self, caller: CallerPath, num_choices: int) -> bool:
        """Return whether the caller would exceed its fair share. The share leaves room for one more caller."""
        own = weight_of(caller[0])
        total = sum(weight_of(key) for key, _ in self._open) + (0 if caller[:2] in self._open else own) + own
        return self._open[caller[:2]] + num_choices > self._limit * own // total
