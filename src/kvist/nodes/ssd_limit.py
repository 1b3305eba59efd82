"""Keeps the pages on an SSD within their limit, which Mooncake's files do not do by themselves.

Above the limit the oldest files are removed, first those of pages that have no other copy: a page that readers want has
a copy in memory, too. The file goes first and the key after it, so that no key stays without its bytes: a reader in
between misses. Scanning a folder takes about a second for a million pages, so a large folder is scanned more rarely.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence

from kvist.clock import Clock
from kvist.errors import KvistError
from kvist.mooncake.master_admin import QUERY_KEYS
from kvist.nodes.ssd_folder import PageFile, SsdFolder

INTERVAL_S = 1.0
_IDLE_SHARE = 20  # pauses are at least this many times as long as a scan
_LOW = 0.9  # share of the limit that is left after a removal

logger = logging.getLogger(__name__)


def beyond_limit(pages: Sequence[PageFile], limit_bytes: int) -> int:
    """Return the bytes to remove: 0 while the pages are within the limit."""
    num_bytes = sum(page.num_bytes for page in pages)
    return 0 if num_bytes <= limit_bytes else num_bytes - int(limit_bytes * _LOW)


def choose(pages: Sequence[PageFile], num_bytes: int, alone: Callable[[Sequence[str]], set[str]]) -> list[PageFile]:
    """Return pages of at least `num_bytes`, or all: the oldest ones without another copy, then the oldest others.
    `alone` returns the keys that have no other copy."""
    chosen: list[PageFile] = []
    others: list[PageFile] = []
    for first in range(0, len(pages), QUERY_KEYS):
        part = pages[first : first + QUERY_KEYS]
        keys = alone([page.key for page in part])
        for page in part:
            if num_bytes <= 0:
                return chosen
            if page.key in keys:
                chosen.append(page)
                num_bytes -= page.num_bytes
            else:
                others.append(page)
    for page in others:
        if num_bytes <= 0:
            break
        chosen.append(page)
        num_bytes -= page.num_bytes
    return chosen


class SsdLimit:
    """Owned by the event loop; `run` until cancelled."""

    def __init__(
        self,
        folder: SsdFolder,
        limit_bytes: int,
        *,
        alone: Callable[[Sequence[str]], set[str]],
        forget: Callable[[Sequence[str]], Awaitable[None]],
        clock: Clock,
    ) -> None:
        """`alone` may block; `forget` removes keys from the pool."""
        self.num_removed = 0
        self._folder, self._limit_bytes, self._alone, self._forget = folder, limit_bytes, alone, forget
        self._clock = clock

    async def run(self) -> None:
        while True:
            started_s = self._clock.now_s()
            try:
                await self.apply()
            except KvistError as error:
                logger.warning("pages on the SSD cannot be removed: %s", error.message)
            await asyncio.sleep(max(INTERVAL_S, _IDLE_SHARE * (self._clock.now_s() - started_s)))

    async def apply(self) -> None:
        """Remove pages if the limit is exceeded. Raises `KvistError`."""
        chosen = await asyncio.to_thread(self._choose)
        for first in range(0, len(chosen), QUERY_KEYS):
            part = chosen[first : first + QUERY_KEYS]
            await asyncio.to_thread(_unlink, part)
            await self._forget([page.key for page in part])
            self.num_removed += len(part)

    def _choose(self) -> list[PageFile]:
        pages = self._folder.pages()
        num_bytes = beyond_limit(pages, self._limit_bytes)
        return choose(pages, num_bytes, self._alone) if num_bytes else []


def _unlink(pages: Sequence[PageFile]) -> None:
    for page in pages:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(page.path)
