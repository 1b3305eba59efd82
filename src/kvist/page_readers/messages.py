"""The messages between an engine and its reader processes, over a socket that keeps their boundaries.

Setup, with the pool's file ──► Opened | Failed;  then Read ──► Done | Failed, one at a time
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

MAX_MESSAGE_BYTES = 1 << 17


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The store to open. The message carries the file descriptor of the pool's memory."""

    backend: str  # a row of STORES
    options: Mapping[str, str | int | float | bool | tuple[str, ...] | None]
    namespace: str
    page_bytes: int
    num_bytes: int  # of the pool
    advertised_host: str
    secret_path: str | None


class Read(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    keys: tuple[bytes, ...]
    offsets: tuple[int, ...]  # of the pages in the pool, in bytes


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The store is open."""


class Done(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The leading pages that were read, and the counts of the reader since its start."""

    num_pages: int
    errors: Mapping[str, int]
    num_hits: int
    num_misses: int
    num_broken: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    message: str
    unreachable: bool  # no call can succeed now, as `StoreUnreachable`


Answer = Opened | Done | Failed

encode = msgspec.msgpack.encode
decode_setup = msgspec.msgpack.Decoder(Setup).decode
decode_read = msgspec.msgpack.Decoder(Read).decode
decode_answer: Callable[[bytes], Answer] = msgspec.msgpack.Decoder(Answer).decode
