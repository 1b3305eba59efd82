"""Messages between an engine process and its parent. From the engine: JSON lines on standard output.

    Progress*  then  StartFailed, or  Ready Beat Beat ...

From the parent: the first line of standard input is the `EngineConfig` as JSON, not an argument, because every user of
the host can read arguments, and the config may contain the cluster key. After a line `DRAIN` the engine takes no new
request and ends after its last request; after a line `STOP` it ends now. The pipe stays open: end of file means that
the parent has ended.
"""

from __future__ import annotations

import msgspec

from kvist.errors import UNDECODABLE
from kvist.request import Role
from kvist.wire import EngineSpec

DRAIN, STOP = b"drain", b"stop"


class Progress(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    text: str  # "loading weights 40%"


class Ready(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    spec: EngineSpec


class StartFailed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    code: str  # of an error in errors.py
    message: str


class Beat(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A heartbeat, sent twice a second by its own thread while the engine serves (watchdog.py)."""

    turn_s: float  # duration of the loop's current iteration
    stalled_s: float  # time without progress
    role: Role | None = None  # the present one: a restarted engine keeps it
    place: str = ""  # where the loop hangs, if it makes no progress: "FUNCTION (FILE:LINE)"


Announcement = Progress | Ready | StartFailed | Beat


_DECODER: msgspec.json.Decoder[Announcement] = msgspec.json.Decoder(type=Announcement)


def encode_line(announcement: Announcement) -> bytes:
    return msgspec.json.encode(announcement) + b"\n"


def decode_line(line: bytes) -> Announcement | None:
    """Decode one line; return None for other lines, such as those printed by a library."""
    try:
        return _DECODER.decode(line)
    except UNDECODABLE:
        return None
