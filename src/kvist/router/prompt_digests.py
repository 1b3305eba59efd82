"""Computes the page digests of prompts, for the index: as few as needed, and none twice.

A prompt's digests are computed in pieces that grow, because most look-ups end at the first page that no worker holds.
The digests of the last prompt are kept: the n answers to one prompt are routed in sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvist.kv.keys import iter_page_digests, root_digest
from kvist.wire import DIGEST_BYTES

_FIRST_PIECE, _GROWTH = 8, 8  # pages


class PromptDigests:
    """Mutable; owned by the router."""

    def __init__(self) -> None:
        self._known: _KnownPrompt | None = None

    def pieces(self, token_ids: tuple[int, ...], page_size: int, namespace: str, salt: str) -> Iterator[bytes]:
        """Yield the digests of the prompt's full pages as the index takes them, computed on demand."""
        known = self._known
        if known is None or known.token_ids is not token_ids or known.space != (page_size, namespace, salt):
            known = self._known = _KnownPrompt(token_ids, page_size, namespace, salt)
        number = 0
        while True:
            if number == len(known.pieces) and not known.extend():
                return
            yield known.pieces[number]
            number += 1


class _KnownPrompt:
    """The pieces of one prompt so far. Mutable; owned by its `PromptDigests`."""

    def __init__(self, token_ids: tuple[int, ...], page_size: int, namespace: str, salt: str) -> None:
        self.token_ids = token_ids
        self.space = (page_size, namespace, salt)
        self.pieces: list[bytes] = []
        self._last_digest = root_digest(namespace, salt)
        self._num_pages = 0
        self._num_next = _FIRST_PIECE

    def extend(self) -> bool:
        """Compute the next piece. Return False if the prompt has no further page."""
        page_size = self.space[0]
        last = min(self._num_pages + self._num_next, len(self.token_ids) // page_size)
        if last == self._num_pages:
            return False
        digests = [*iter_page_digests(self._last_digest, self.token_ids, page_size, last, self._num_pages)]
        self.pieces.append(b"".join([digest[:DIGEST_BYTES] for digest in digests]))
        self._last_digest, self._num_pages = digests[-1], last
        self._num_next *= _GROWTH
        return True
