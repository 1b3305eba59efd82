"""Decompresses request bodies (Content-Encoding), up to the size limit of a body.

Decompression stops at the limit, however large the body would become, and yields to the event loop between pieces.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kvist.errors import BodyTooLarge, RequestError, SlowBody, UnsupportedMediaType
from kvist.http.work import BodyShare

_PIECE_BYTES = 1 << 18  # decompressed in about a millisecond
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """The limits of one request body, before and after decompression, and the flags that set them, if any does."""

    max_bytes: int
    timeout_s: float
    bytes_flag: str | None = None
    timeout_flag: str | None = None

    def too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the request body is over the limit of {self.max_bytes} bytes{_set_by(self.bytes_flag)}")

    def too_slow(self) -> SlowBody:
        return SlowBody(f"the request body did not arrive within {self.timeout_s:g} s{_set_by(self.timeout_flag)}")


def _set_by(flag: str | None) -> str:
    return "" if flag is None else f" ({flag})"


def body_decoder(
    content_encoding: bytes | None, share: BodyShare, limits: BodyLimits
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
        return await _inflate(body, "deflate" if coding == "deflate" else "gzip", share, limits)

    return decode


async def _inflate(body: bytes, coding: str, share: BodyShare, limits: BodyLimits) -> bytes:
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
        if num_bytes > limits.max_bytes:
            raise limits.too_large()
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
