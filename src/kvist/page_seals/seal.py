"""The header of a stored page, by which a reader recognises it: whose page it is, of which size, and its seal.

    magic · version · page_bytes · space · key · seal      `HEADER_BYTES` in all; stores pad it

`space` is a digest of the namespace (kv/layout.py) and of the store's secret, `key` the digest of the page's tokens,
and `seal` covers these fields and every byte of the page. With a secret the seal is a keyed BLAKE3: without the secret,
no process can make a page that is accepted, or guess the name of a space. Without a secret the seal is an xxh3_128,
which finds every accident (flipped bytes, another page's bytes, a page that was cut short), and takes a tenth of the
time.
"""

from __future__ import annotations

import struct

import xxhash
from blake3 import blake3

from kvist.kv.keys import DIGEST_BYTES
from kvist.page_seals.secret import page_key

_MAGIC, _VERSION = b"kvist-kv", 2
_FIELDS = struct.Struct("<8sIQ16s32s")  # magic, version, page_bytes, space, key
_SPACE_BYTES, _SEAL_BYTES = 16, 32
HEADER_BYTES = _FIELDS.size + _SEAL_BYTES


class PageSeals:
    """Makes the headers of the pages of one namespace. Immutable; used by several threads."""

    def __init__(self, namespace: str, page_bytes: int, secret: bytes | None) -> None:
        key = page_key(secret or b"", namespace)
        names_key = blake3(b"names", key=key).digest()
        self._seal_key = blake3(b"seals", key=key).digest() if secret else None
        self._page_bytes = page_bytes
        self.space = blake3(namespace.encode(), key=names_key).digest(length=_SPACE_BYTES)

    def header(self, key: bytes, page: memoryview) -> bytes:
        """Return the header of a page with this content, `HEADER_BYTES` long."""
        assert len(key) == DIGEST_BYTES, "a key is a page digest"
        assert page.nbytes == self._page_bytes
        fields = _FIELDS.pack(_MAGIC, _VERSION, self._page_bytes, self.space, key)
        if self._seal_key is not None:
            return fields + blake3(fields, key=self._seal_key).update(page).digest()
        checksum = xxhash.xxh3_128(fields)
        checksum.update(page)
        return fields + checksum.digest().ljust(_SEAL_BYTES, b"\0")
