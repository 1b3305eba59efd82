"""Decompresses request bodies (Content-Encoding), up to the size limit of a body.

Decompression stops at the limit, however large the body would become, and yields to the event loop between pieces.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable

from kvist.errors import BodyTooLarge, RequestError, UnsupportedMediaType
from kvist.http.work import BodyShare

_PIECE_BYTES = 1 << 18  # decompressed in about a millisecond
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


def body_too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is over the limit of {limit_bytes} bytes (--max-body-bytes)")


def body_decoder(
    content_encoding: bytes | None, share: BodyShare, limit_bytes: int
) -> Callable[[bytes], Awaitable[bytes]] | None:
    """Return the decoder, or None for a body that is not compressed. Raise `UnsupportedMediaType` for an unsupported
    coding."""
    coding = (content_encoding or b"").decode("latin-1").strip().lower()
    if coding in ("", "identity"):
        return None
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise UnsupportedMediaType(
            f"Content-Encoding {coding[:64]!r} is not supported; send the body as it is, or with gzip or deflate"
        )

    async def decode(body: bytes) -> bytes:
        return await _inflate(body, "deflate" if coding == "deflate" else "gzip", share, limit_bytes)

    return decode


async def _inflate(body: bytes, coding: str, share: BodyShare, limit_bytes: int) -> bytes:
    inflater = zlib.decompressobj(_GZIP if coding == "gzip" else _deflate_bits(body))
    pieces: list[bytes] = []
    num_bytes, rest = 0, body
    while not inflater.eof:
        try:
            piece = inflater.decompress(rest, _PIECE_BYTES)
        except zlib.error as error:
            raise _invalid_encoding(coding) from error
        rest = inflater.unconsumed_tail
        num_bytes += len(piece)
        if num_bytes > limit_bytes:
            raise body_too_large(limit_bytes)
        share.reserve_up_to(len(body) + num_bytes)
        if not piece and not rest and not inflater.eof:
            raise _invalid_encoding(coding)  # truncated
        pieces.append(piece)
        await asyncio.sleep(0)
    if inflater.unused_data:
        raise _invalid_encoding(coding)
    return b"".join(pieces)


def _deflate_bits(body: bytes) -> int:
    """Return zlib's window bits: HTTP's `deflate` is the zlib format, but some clients send raw deflate."""
    zlib_header = len(body) >= 2 and body[0] & 0x0F == zlib.DEFLATED and int.from_bytes(body[:2], "big") % 31 == 0
    return _ZLIB if zlib_header else _RAW


def _invalid_encoding(coding: str) -> RequestError:
    return RequestError(f"the request body is not valid {coding}, as its Content-Encoding says")
