"""Keys of pages: a page's tokens as bytes, and the digest that identifies the page in all processes.

    digest_i = SHA-256(digest_{i-1}, then the tokens of page i as int32 little-endian)
    digest_{-1} = SHA-256(SHA-256(namespace), then cache_salt)

A digest therefore identifies the whole prefix, not only one page's tokens, and pages of different models, layouts or
salts never have the same digest. Tiers, stores and routers compare digests alone, and clients choose the tokens: 32
bytes of SHA-256 withstand an attacker who searches for two prompts with one digest
(docs/adr/0012-digests-withstand-people.md, docs/adr/0027-digests-are-sha-256.md).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence
from hashlib import sha256

DIGEST_BYTES = 32
_TOKEN_BYTES = 4
_FIRST_PAGES_AT_ONCE = 4
_PAGES_AT_ONCE = 64  # after the first pages: enough to amortise the call, few enough for the L1 CPU cache


def page_keys(token_ids: Sequence[int], page_size: int, first_page: int, last_page: int) -> list[bytes]:
    """Encode the tokens of each page in [first_page, last_page) as int32 little-endian: the tree's edges.

    Raises struct.error for a token id beyond int32.
    """
    encoded = encode_tokens(token_ids, first_page * page_size, last_page * page_size)
    if last_page - first_page == 1:  # nearly every call: a page became full during decode
        return [encoded]
    key_bytes = page_size * _TOKEN_BYTES
    return [encoded[start : start + key_bytes] for start in range(0, len(encoded), key_bytes)]


def encode_tokens(token_ids: Sequence[int], first: int, last: int) -> bytes:
    """Encode the tokens in [first, last) as int32 little-endian. Raises struct.error for a token id beyond int32."""
    # struct takes half the time of numpy or array, which use the iterator protocol here.
    return _int32s(last - first).pack(*token_ids[first:last])


@functools.lru_cache(maxsize=256)
def _int32s(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}i")


def iter_page_keys(token_ids: Sequence[int], page_size: int, num_pages: int, first_page: int = 0) -> Iterator[bytes]:
    """Yield the `page_keys` of [first_page, num_pages), encoded on demand: a match often ends at the first page."""
    page, num_at_once = first_page, _FIRST_PAGES_AT_ONCE
    while page < num_pages:
        end = min(page + num_at_once, num_pages)
        yield from page_keys(token_ids, page_size, page, end)
        page, num_at_once = end, _PAGES_AT_ONCE


def root_digest(namespace: str, cache_salt: str = "") -> bytes:
    """Return the digest that the first page's digest is chained to."""
    return chain_digest(sha256(namespace.encode()).digest(), cache_salt.encode())


def chain_digest(parent_digest: bytes, page_key: bytes) -> bytes:
    """Return the digest of the page with the tokens `page_key` after the prefix with `parent_digest`.

    Raises ValueError for a parent of another length."""
    if len(parent_digest) != DIGEST_BYTES:
        raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(parent_digest)}")
    return sha256(parent_digest + page_key).digest()


def iter_page_digests(
    digest: bytes, token_ids: Sequence[int], page_size: int, num_pages: int, first_page: int = 0
) -> Iterator[bytes]:
    """Yield the digests of pages [first_page, num_pages), on demand; `digest` is the digest of the page before them."""
    for key in iter_page_keys(token_ids, page_size, num_pages, first_page):
        digest = chain_digest(digest, key)
        yield digest


def chained_digests(digest: bytes, encoded: bytes, page_size: int) -> list[bytes]:
    """Return the digests of pages encoded by `encode_tokens`; `digest` is the digest of the page before them."""
    # `chain_digest`, without its call: a gateway computes thousands of digests for one prompt
    keys, hashed = struct.iter_unpack(f"{page_size * _TOKEN_BYTES}s", encoded), sha256
    return [digest := hashed(digest + key).digest() for (key,) in keys]


def page_digests(token_ids: Sequence[int], page_size: int, namespace: str, cache_salt: str = "") -> list[bytes]:
    """Return one digest for each full page of `token_ids`; tokens after the last full page are ignored."""
    digest = root_digest(namespace, cache_salt)
    return list(iter_page_digests(digest, token_ids, page_size, len(token_ids) // page_size))
