"""The speed of a worker, measured from the counters in its load reports and from its handoffs. PURE.

A rate is a sum of amounts over a sum of seconds. Older amounts fade with each report, and each sum begins with a small
assumed amount, so that a worker without measurements has a sensible rate, and one odd report changes little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvist.flight.handoff_report import HandoffReport

_FADE = 0.9  # weight of the earlier amounts after each new one
_ASSUMED_S = 0.05  # seconds of the assumed amount


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast a worker works."""

    prompt_tokens_per_s: float = 4000.0
    host_bytes_per_s: float = 5e9  # from the host tier into the device pool
    store_bytes_per_s: float = 5e8  # from the store
    handoff_bytes_per_s: float = 1e9  # of pages that arrive from a prefill worker, in the time that the stream waits
    # Time of the decode steps of a mean answer; None before the first answer, and for a worker without decode steps.
    decode_s: float | None = None
    decode_step_s: float | None = None  # of one step without prompt tokens; None until one was measured


_START = Rates()
_SLOWEST = Rates(prompt_tokens_per_s=1.0, host_bytes_per_s=1e5, store_bytes_per_s=1e4, handoff_bytes_per_s=1e5)
_FASTEST = Rates(prompt_tokens_per_s=1e7, host_bytes_per_s=1e12, store_bytes_per_s=1e12, handoff_bytes_per_s=1e12)


class _Ratio:
    """Mutable; owned by its `RateMeter`."""

    def __init__(self, start: float, lowest: float, highest: float) -> None:
        self._amount, self._seconds = start * _ASSUMED_S, _ASSUMED_S
        self.is_measured = False
        self._lowest, self._highest = lowest, highest

    def add(self, amount: float, seconds: float) -> None:
        if amount > 0.0 and seconds > 0.0:
            self._amount = self._amount * _FADE + amount
            self._seconds = self._seconds * _FADE + seconds
            self.is_measured = True

    @property
    def per_s(self) -> float:
        return min(self._highest, max(self._lowest, self._amount / self._seconds))


def _ratio(name: str) -> _Ratio:
    return _Ratio(getattr(_START, name), getattr(_SLOWEST, name), getattr(_FASTEST, name))


@dataclass(slots=True)
class RateMeter:
    """Mutable; owned by one worker of the registry."""

    _prompt: _Ratio = field(default_factory=lambda: _ratio("prompt_tokens_per_s"))
    _host: _Ratio = field(default_factory=lambda: _ratio("host_bytes_per_s"))
    _store: _Ratio = field(default_factory=lambda: _ratio("store_bytes_per_s"))
    _handoff: _Ratio = field(default_factory=lambda: _ratio("handoff_bytes_per_s"))
    _steps: _Ratio = field(default_factory=lambda: _Ratio(50.0, 0.01, 1e5))  # decode steps a second
    _answers: _Ratio = field(default_factory=lambda: _Ratio(100.0, 1.0, 1e6))  # tokens of an answer
    _totals: Mapping[str, float] = field(default_factory=dict)  # of the last report
    rates: Rates = field(default_factory=Rates)

    def on_totals(self, totals: Mapping[str, float]) -> None:
        """Apply the counters of a load report. They only grow, except after a restart of the worker."""
        before, self._totals = self._totals, totals
        for ratio, amount, seconds in (
            (self._prompt, "prompt_step_tokens", "prompt_step_seconds"),
            (self._host, "host_load_bytes", "host_load_seconds"),
            (self._store, "storage_read_bytes", "storage_read_seconds"),
            (self._steps, "decode_steps", "decode_step_seconds"),
            (self._answers, "generation_tokens", "requests_finished"),
        ):
            ratio.add(*(totals.get(name, 0.0) - before.get(name, 0.0) for name in (amount, seconds)))
        self._update()

    def on_handoff(self, report: HandoffReport) -> None:
        """Apply the report of a handoff to this worker."""
        self._handoff.add(report.num_bytes, report.wait_s)
        self._update()

    def _update(self) -> None:
        self.rates = Rates(
            prompt_tokens_per_s=self._prompt.per_s,
            host_bytes_per_s=self._host.per_s,
            store_bytes_per_s=self._store.per_s,
            decode_s=self._answers.per_s / self._steps.per_s if self._steps.is_measured else None,
            decode_step_s=1.0 / self._steps.per_s if self._steps.is_measured else None,
            handoff_bytes_per_s=self._handoff.per_s,
        )
