"""The names of pages: what a page holds, as bytes, and the digest by which other processes know it.

    digest_i = BLAKE3(tokens of page i as int32 little-endian, keyed with digest_{i-1})
    digest_{-1} = BLAKE3(cache_salt, keyed with BLAKE3(namespace))

So a digest names the whole prefix, not one page's tokens, and pages of another model, layout, adapter or salt never
meet. Tiers, the store and routing trust a digest alone, and the tokens are a client's to choose: 32 bytes of BLAKE3
withstand somebody who looks for two prompts of one digest (docs/adr/0012-digests-withstand-people.md).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence

from blake3 import blake3

DIGEST_BYTES = 32  # BLAKE3's own length, and that of its keys: a digest is the key of the next
_TOKEN_BYTES = 4
_PAGES_AT_ONCE = 64  # encoded together: enough to amortise the call, few enough to stay in the nearest CPU cache


def page_keys(token_ids: Sequence[int], page_size: int, first_page: int, last_page: int) -> list[bytes]:
    """The tokens of each page in [first_page, last_page) as int32 little-endian: the tree's edges.

    Raises struct.error for a token id beyond int32.
    """
    tokens = token_ids[first_page * page_size : last_page * page_size]
    # struct takes half the time of numpy or array here, which go through the iterator protocol.
    encoded = _int32s((last_page - first_page) * page_size).pack(*tokens)
    if last_page - first_page == 1:  # a decode's page has become full: nearly every call
        return [encoded]
    key_bytes = page_size * _TOKEN_BYTES
    return [encoded[start : start + key_bytes] for start in range(0, len(encoded), key_bytes)]


@functools.lru_cache(maxsize=256)
def _int32s(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}i")


def iter_page_keys(token_ids: Sequence[int], page_size: int, num_pages: int, first_page: int = 0) -> Iterator[bytes]:
    """`page_keys` of [first_page, num_pages), encoded as they are asked for: a match may break off early."""
    for page in range(first_page, num_pages, _PAGES_AT_ONCE):
        yield from page_keys(token_ids, page_size, page, min(page + _PAGES_AT_ONCE, num_pages))


def root_digest(namespace: str, cache_salt: str = "") -> bytes:
    """The digest before the first page."""
    return chain_digest(blake3(namespace.encode()).digest(), cache_salt.encode())


def chain_digest(parent_digest: bytes, page_key: bytes) -> bytes:
    """The digest of the page whose tokens are `page_key` after the prefix named by `parent_digest`."""
    return blake3(page_key, key=parent_digest).digest()


def iter_page_digests(
    digest: bytes, token_ids: Sequence[int], page_size: int, num_pages: int, first_page: int = 0
) -> Iterator[bytes]:
    """Of pages [first_page, num_pages), made as they are asked for; `digest` is that of the page before them."""
    for key in iter_page_keys(token_ids, page_size, num_pages, first_page):
        digest = chain_digest(digest, key)
        yield digest


def page_digests(token_ids: Sequence[int], page_size: int, namespace: str, cache_salt: str = "") -> list[bytes]:
    """One digest for each full page of `token_ids`; tokens after the last full page have none."""
    digest = root_digest(namespace, cache_salt)
    return list(iter_page_digests(digest, token_ids, page_size, len(token_ids) // page_size))
