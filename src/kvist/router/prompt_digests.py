"""Computes the page digests of prompts, for the index: as few as needed, and those of one prefix once.

A prompt is cut into chunks: a short one, then chunks of `CHUNK_TOKENS`. A hash of a chunk, chained to the chunk before,
identifies the whole prefix; the digests of `MAX_CHUNKS` chunks are remembered. Hashing a chunk takes a tenth of the
time of its digests: the next turn of a long chat costs little more than its new part.

Digests come in pieces that grow, because most look-ups end at the first page that no worker holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvist.kv.keys import chain_digest, chained_digests, encode_tokens, root_digest
from kvist.wire import DIGEST_BYTES

CHUNK_TOKENS = 1024
MAX_CHUNKS = 16_384  # 1.3 kB each: 17 million tokens in 22 MB
_FIRST_PAGES = 8
_GROWTH = 8  # a piece ends when the pages so far are this many times those before the piece, unless few are left


@dataclass(slots=True)
class _Prompt:
    """The pieces of one prompt so far. Mutable; owned by its `PromptDigests`."""

    token_ids: tuple[int, ...]
    space: tuple[int, str, str]
    more: Iterator[bytes]
    known: list[bytes] = field(default_factory=list)


class PromptDigests:
    """Mutable; owned by the router."""

    def __init__(self) -> None:
        # The short digests, and the last one in full, by the hash of the chunk; least recently used first.
        self._chunks: OrderedDict[bytes, tuple[bytes, bytes]] = OrderedDict()
        self._last: _Prompt | None = None  # the n answers to one prompt are routed in sequence

    @property
    def num_chunks(self) -> int:
        return len(self._chunks)

    def pieces(self, token_ids: tuple[int, ...], page_size: int, namespace: str, salt: str) -> Iterator[bytes]:
        """Yield the digests of the prompt's full pages as the index takes them, computed on demand."""
        space = (page_size, namespace, salt)
        last = self._last
        if last is None or last.token_ids is not token_ids or last.space != space:
            more = self._compute(token_ids, page_size, root_digest(namespace, salt))
            last = self._last = _Prompt(token_ids, space, more)
        yield from last.known
        for piece in last.more:
            last.known.append(piece)
            yield piece

    def _compute(self, token_ids: tuple[int, ...], page_size: int, digest: bytes) -> Iterator[bytes]:
        num_pages = len(token_ids) // page_size
        chunk_id, first, num_sent = digest, 0, 0
        ready: list[bytes] = []
        while first < num_pages:
            last = min(first + (max(1, CHUNK_TOKENS // page_size) if first else _FIRST_PAGES), num_pages)
            encoded = encode_tokens(token_ids, first * page_size, last * page_size)
            chunk_id = chain_digest(chunk_id, encoded)
            digests, digest = self._chunks.get(chunk_id) or _digests_of(digest, encoded, page_size)
            self._remember(chunk_id, digests, digest)
            ready.append(digests)
            first = last
            if first >= _GROWTH * num_sent and num_pages - first > first // 4:
                yield b"".join(ready)
                ready, num_sent = [], first
        if ready:
            yield b"".join(ready)

    def _remember(self, chunk_id: bytes, digests: bytes, last_digest: bytes) -> None:
        self._chunks[chunk_id] = digests, last_digest
        self._chunks.move_to_end(chunk_id)
        if len(self._chunks) > MAX_CHUNKS:
            self._chunks.popitem(last=False)


def _digests_of(digest: bytes, encoded: bytes, page_size: int) -> tuple[bytes, bytes]:
    """Return the short digests of the pages after the one with `digest`, and the last one in full."""
    digests = chained_digests(digest, encoded, page_size)
    return b"".join([each[:DIGEST_BYTES] for each in digests]), digests[-1]
