"""Counts, on the client's side, the prompt tokens that a cache without eviction would have hit.

A page is cached once any client has sent it or received it in an answer. Of an answer, the server has the K/V of all
tokens but the last, which was never an input; of a prompt, it must compute at least the last token. The count covers
this run alone: it knows neither the earlier contents of the server's cache, nor the order in which the server took the
requests that were in flight together.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import xxhash

_json = msgspec.json.Encoder().encode


class _Pages:
    """The whole pages of one conversation. A digest names a page and all pages before it."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.digests: list[bytes] = []
        self.rest: list[int] = []  # tokens after the last whole page


class InfiniteCache:
    """Mutable; owned by one run of a scenario. Conversations are numbered by client."""

    def __init__(self, num_clients: int, page_size: int) -> None:
        self._page_size = page_size
        self._pages = [_Pages() for _ in range(num_clients)]
        self._known: set[bytes] = set()

    def append(self, client: int, token_ids: Sequence[int]) -> None:
        """Append tokens that no request has carried yet to the conversation."""
        size, pages = self._page_size, self._pages[client]
        tokens = [*pages.rest, *token_ids]
        end = len(tokens) - len(tokens) % size
        for start in range(0, end, size):
            parent = pages.digests[-1] if pages.digests else b""
            pages.digests.append(xxhash.xxh3_128_digest(parent + _json(tokens[start : start + size])))
        pages.rest = tokens[end:]
        pages.num_tokens += len(token_ids)

    def record_prompt(self, client: int) -> int:
        """Record the whole conversation as a sent prompt. Return how many of its tokens were cached before."""
        pages, num_known = self._pages[client], 0
        most = (pages.num_tokens - 1) // self._page_size
        while num_known < most and pages.digests[num_known] in self._known:
            num_known += 1
        self._known.update(pages.digests[num_known:])
        return num_known * self._page_size

    def record_answer(self, client: int) -> None:
        """Record that the conversation now ends with an answer of the server."""
        pages = self._pages[client]
        self._known.update(pages.digests[: (pages.num_tokens - 1) // self._page_size])
