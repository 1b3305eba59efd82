"""Decides which replica of each page is read. Pure: the store (mooncake.py) reads, and reports what came of it.

    ReadPlan: pending ──next_reads──► being read ──ended──► read
                 ▲                        └──failed, another replica left──┐
                 └─────────────────────────────────────────────────────────┘
                                          └──failed, none left──► missing

Readers take turns: replica by replica from page to page, from call to call and, since each process begins at a random
turn, from process to process. Reads of a popular page therefore reach all of its stores. A store whose read has failed
is not read again for `SUSPECT_S`, because each try may take seconds; meanwhile the master removes a store that is
really gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SUSPECT_S = 10.0  # Mooncake's own --client_ttl


@dataclass(frozen=True, slots=True)
class Replica:
    """A copy of a page in the memory of one store."""

    session: str  # of the store's engine
    address: int  # in the store's memory


class SuspectStores:
    """The stores whose last read failed. Mutable; owned by one reader."""

    def __init__(self, pause_s: float = SUSPECT_S) -> None:
        self._pause_s = pause_s
        self._until_s: dict[str, float] = {}

    def add(self, session: str, now_s: float) -> None:
        self._until_s[session] = now_s + self._pause_s

    def contains(self, session: str, now_s: float) -> bool:
        until_s = self._until_s.get(session)
        if until_s is not None and now_s >= until_s:
            del self._until_s[session]
            return False
        return until_s is not None


class ReadPlan:
    """The reads of one call, whose pages are counted from 0. Mutable; owned by one reader."""

    def __init__(self, replicas: Sequence[Sequence[Replica]], turn: int) -> None:
        self._left = [list(each) for each in replicas]  # replicas that have not been tried
        self._turn = turn
        self._reading: dict[str, list[int]] = {}
        self._read: set[int] = set()

    def next_reads(self, suspects: SuspectStores, now_s: float) -> Mapping[str, list[tuple[int, Replica]]]:
        """Return the next reads by session, as pages with their replicas; empty when nothing more can be read. Pages
        after a missing page are not read. Each session's reads are answered by `ended`."""
        assert not self._reading, "the reads before have not ended"
        reads: dict[str, list[tuple[int, Replica]]] = {}
        for page in range(len(self._left)):
            if page in self._read:
                continue
            usable = [each for each in self._left[page] if not suspects.contains(each.session, now_s)]
            if not usable:
                break
            replica = usable[(self._turn + page) % len(usable)]
            self._left[page].remove(replica)
            reads.setdefault(replica.session, []).append((page, replica))
        self._reading = {session: [page for page, _ in pages] for session, pages in reads.items()}
        return reads

    def ended(self, session: str, ok: bool) -> None:
        pages = self._reading.pop(session)
        if ok:
            self._read.update(pages)

    def skip(self, page: int) -> None:
        """Do not read this page, and read the pages after it: the page comes from elsewhere."""
        self._read.add(page)

    def is_read(self, page: int) -> bool:
        return page in self._read


def num_leading(oks: Iterable[object]) -> int:
    """Return the number of true values before the first false one."""
    number = 0
    for ok in oks:
        if not ok:
            break
        number += 1
    return number
