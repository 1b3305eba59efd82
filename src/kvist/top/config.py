"""The options of `kvist top` that no other verb has."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class TopOptions:
    once: bool = option(False, "print the figures once, and end; also if standard output is not a terminal")
    interval_s: float = option(1.0, "time between two readings", unit="s", minimum=0.2, maximum=60)
