"""The names of pages: what a page holds, as bytes, and the digest by which other processes know it.

    digest_i = xxh3_128(digest_{i-1} + tokens of page i as int32 little-endian)
    digest_{-1} = xxh3_128(namespace + "\\0" + cache_salt)

So a digest names the whole prefix, not one page's tokens, and pages of another model, layout, adapter or salt never
meet. Digests guide routing and tiers; the radix tree itself compares the tokens. xxh3 is quick, not cryptographic: a
forged collision can mislead a router, never a match in the tree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

DIGEST_BYTES = 16
TOKEN_BYTES = 4


def encode_tokens(token_ids: Sequence[int]) -> bytes:
    """The tokens as int32 little-endian: `TOKEN_BYTES` each. Raises OverflowError for an id that does not fit."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def root_digest(namespace: str, cache_salt: str = "") -> bytes:
    """The digest before the first page."""
    assert "\0" not in namespace, "a NUL in the namespace would let two (namespace, salt) pairs meet"
    return chain_digest(namespace.encode() + b"\0", cache_salt.encode())


def chain_digest(parent_digest: bytes, page_key: bytes) -> bytes:
    """The digest of the page whose tokens are `page_key` after the prefix named by `parent_digest`."""
    digest: bytes = xxhash.xxh3_128_digest(parent_digest + page_key)
    return digest


def page_digests(token_ids: Sequence[int], page_size: int, namespace: str, cache_salt: str = "") -> list[bytes]:
    """One digest for each full page of `token_ids`; tokens after the last full page have none."""
    num_pages = len(token_ids) // page_size
    tokens = encode_tokens(token_ids)
    page_bytes = page_size * TOKEN_BYTES
    digest = root_digest(namespace, cache_salt)
    digests = []
    for start in range(0, num_pages * page_bytes, page_bytes):
        digest = chain_digest(digest, tokens[start : start + page_bytes])
        digests.append(digest)
    return digests
