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
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from blake3 import blake3

from kvist.kv.keys import chained_digests, encode_tokens, root_digest
from kvist.wire import DIGEST_BYTES

CHUNK_TOKENS = 1024
MAX_CHUNKS = 16_384  # 1.3 kB each: 17 million tokens in 22 MB
_FIRST_PAGES = 8
_GROWTH = 8  # at the end of a piece the pages so far are this many times those before the piece, unless few are left


class _Chunk(NamedTuple):
    digests: bytes  # shortened, joined
    last_digest: bytes  # in full


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
        self._chunks: OrderedDict[bytes, _Chunk] = OrderedDict()  # by the hash of the chunk; least recently used first
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
        num_pages, chunk_pages = len(token_ids) // page_size, _FIRST_PAGES
        chunk_id, first = digest, 0
        ready: list[bytes] = []  # known ones, which cost little: a look-up of many at once takes the least time
        while first < num_pages:
            last = _end_of_piece(first, num_pages, chunk_pages)
            encoded = encode_tokens(token_ids, first * page_size, last * page_size)
            size = len(encoded) // (last - first) * chunk_pages
            parts = [encoded[at : at + size] for at in range(0, len(encoded), size)]
            chunk_ids = [chunk_id := blake3(part, key=chunk_id).digest() for part in parts]
            chunks = self._known(chunk_ids)
            digest = chunks[-1].last_digest if chunks else digest
            num_new = last - first - len(chunks) * chunk_pages
            if num_new > 0:
                if ready and num_new > last // _GROWTH:
                    yield b"".join(ready)
                    ready = []
                chunks += _chunks_of(digest, encoded[len(chunks) * size :], page_size, chunk_pages)
            self._remember(chunk_ids, chunks)
            ready += [chunk.digests for chunk in chunks]
            if num_new > 0:
                yield b"".join(ready)
                ready = []
            digest, first, chunk_pages = chunks[-1].last_digest, last, max(1, CHUNK_TOKENS // page_size)
        if ready:
            yield b"".join(ready)

    def _known(self, chunk_ids: list[bytes]) -> list[_Chunk]:
        """Return the leading chunks that are remembered."""
        return [self._chunks[chunk_id] for chunk_id in takewhile(self._chunks.__contains__, chunk_ids)]

    def _remember(self, chunk_ids: list[bytes], chunks: list[_Chunk]) -> None:
        for chunk_id, chunk in zip(chunk_ids, chunks, strict=True):
            self._chunks[chunk_id] = chunk
            self._chunks.move_to_end(chunk_id)
        while len(self._chunks) > MAX_CHUNKS:
            self._chunks.popitem(last=False)


def _end_of_piece(first: int, num_pages: int, chunk_pages: int) -> int:
    """Return the end of the piece that begins at page `first`: whole chunks, or all pages that are left."""
    last = first + chunk_pages * max(1, -(-(_GROWTH - 1) * first // chunk_pages))
    return last if num_pages - last > last // 4 else num_pages


def _chunks_of(digest: bytes, encoded: bytes, page_size: int, chunk_pages: int) -> list[_Chunk]:
    """Return the chunks after the page with `digest`. `encoded` is not empty."""
    digests = chained_digests(digest, encoded, page_size)
    rows = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), -1)
    short = rows[:, :DIGEST_BYTES].tobytes()
    ends = [min(first + chunk_pages, len(digests)) for first in range(0, len(digests), chunk_pages)]
    return [
        _Chunk(short[first * DIGEST_BYTES : end * DIGEST_BYTES], digests[end - 1])
        for first, end in zip(range(0, len(digests), chunk_pages), ends, strict=True)
    ]
