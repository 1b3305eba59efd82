"""What an engine process tells the process that started it: JSON lines on standard output, until it serves.

    Progress*  then  Ready | StartFailed

And the other way: the first line of standard input is the `EngineConfig` as JSON (not an argument, which any user of
the host could read: it may hold the cluster key); then the pipe stays open, and its end means that the parent is gone.
"""

from __future__ import annotations

import msgspec

from kvist.wire import EngineSpec


class Progress(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    text: str  # "loading weights 40%"


class Ready(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    spec: EngineSpec
    gateway_cores: tuple[int, ...] = ()  # where the parent should run from now on; empty: anywhere


class StartFailed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    code: str  # errors.py's
    message: str


Announcement = Progress | Ready | StartFailed


_DECODER: msgspec.json.Decoder[Announcement] = msgspec.json.Decoder(type=Announcement)


def encode_line(announcement: Announcement) -> bytes:
    return msgspec.json.encode(announcement) + b"\n"


def decode_line(line: bytes) -> Announcement | None:
    """None: the line is something else, printed by a library."""
    try:
        return _DECODER.decode(line)
    except msgspec.DecodeError:
        return None
