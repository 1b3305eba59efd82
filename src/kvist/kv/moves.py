"""What is asked of, and heard from, whoever copies pages between the tiers (mover.py). A plan carries the first three.

Each job is answered once, whatever becomes of it. Until then no page and no slot that it names goes to anybody else.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPages:
    """Copy host pages into our device pool; answered by `PagesLoaded`."""

    job_id: int
    host_slots: tuple[int, ...]
    page_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackUpPages:
    """Copy pages of our device pool into the host's; answered by `PagesBackedUp`."""

    job_id: int
    page_ids: tuple[int, ...]
    host_slots: tuple[int, ...]
    names: tuple[tuple[bytes, bytes | None], ...] = field(default=(), repr=False)  # (digest, that of the page before)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetPages:
    """These host pages were flushed: no restart may bring them back. Answered by `PagesForgotten`.

    It holds no slot: what is copied into one of them later comes behind it."""

    job_id: int
    host_slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesForgotten:
    job_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesLoaded:
    job_id: int
    ok: bool  # every byte is in place; else the device pages hold nothing of use


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesBackedUp:
    job_id: int
    ok: bool  # every byte is in place; else the host slots hold nothing of use
