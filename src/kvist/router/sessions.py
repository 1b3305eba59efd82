"""PURE. The workers that served the last request of each session.

A session is any name that clients give to requests with a common prefix: `session_id`, `prompt_cache_key`. Its last
workers are a hint: a policy prefers them among workers that are otherwise about equal. The index of pages says more,
but not before a worker has reported its new pages.
"""

from __future__ import annotations

from collections import OrderedDict

from kvist.request import WorkerId

MAX_SESSIONS = 1 << 16  # about 20 MB; the sessions that were used least recently are forgotten
_NONE: frozenset[WorkerId] = frozenset()


class Sessions:
    """Mutable; owned by the router."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, frozenset[WorkerId]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._last)

    def last(self, session: str) -> frozenset[WorkerId]:
        """Return the workers of the session's last request; none if the session is unknown, or is ""."""
        return self._last.get(session, _NONE)

    def remember(self, session: str, *worker_ids: WorkerId) -> None:
        if session:
            self._last[session] = frozenset(worker_ids)
            self._last.move_to_end(session)
            if len(self._last) > MAX_SESSIONS:
                self._last.popitem(last=False)
