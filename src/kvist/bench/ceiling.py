"""What a cache that forgets nothing would have hit of the prompts that were sent, counted by who sends them.

A page is known from when it is sent or answered, whoever did. Of an answer the server has the K/V of all tokens but the
last, which nothing has read; of a prompt it must compute at least the last token. It knows the run alone: not what the
server had cached before, and not the order in which it took what was in flight together.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import xxhash

_json = msgspec.json.Encoder().encode


class _Pages:
    """One conversation's whole pages by digest, which names the page and all before it."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.digests: list[bytes] = []
        self.rest: list[int] = []  # tokens after the last whole page


class Ceiling:
    """Mutable; owned by one run of a scenario. A conversation is known by its client's number."""

    def __init__(self, num_clients: int, page_size: int) -> None:
        self._page_size = page_size
        self._pages = [_Pages() for _ in range(num_clients)]
        self._known: set[bytes] = set()

    def append(self, client: int, token_ids: Sequence[int]) -> None:
        """The conversation goes on; nobody has seen these tokens yet."""
        size, pages = self._page_size, self._pages[client]
        tokens = [*pages.rest, *token_ids]
        end = len(tokens) - len(tokens) % size
        for start in range(0, end, size):
            parent = pages.digests[-1] if pages.digests else b""
            pages.digests.append(xxhash.xxh3_128_digest(parent + _json(tokens[start : start + size])))
        pages.rest = tokens[end:]
        pages.num_tokens += len(token_ids)

    def sent(self, client: int) -> int:
        """The whole conversation is a prompt: how many of its tokens were known. Now all its pages are."""
        pages, num_known = self._pages[client], 0
        most = (pages.num_tokens - 1) // self._page_size
        while num_known < most and pages.digests[num_known] in self._known:
            num_known += 1
        self._known.update(pages.digests[num_known:])
        return num_known * self._page_size

    def answered(self, client: int) -> None:
        """The conversation ends with an answer by the server."""
        pages = self._pages[client]
        self._known.update(pages.digests[: (pages.num_tokens - 1) // self._page_size])
