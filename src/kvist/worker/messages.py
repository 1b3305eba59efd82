"""What an engine process tells the process that started it: JSON lines on standard output.

    Progress*  then  StartFailed, or  Ready Beat Beat ...

And the other way: the first line of standard input is the `EngineConfig` as JSON (not an argument, which any user of
the host could read: it may hold the cluster key). A line `DRAIN` asks the engine to take no new request and to end
after its last one; a line `STOP`, to end now. The pipe stays open: its end means that the parent is gone.
"""

from __future__ import annotations

import msgspec

from kvist.errors import UNDECODABLE
from kvist.wire import EngineSpec

DRAIN, STOP = b"drain", b"stop"


class Progress(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    text: str  # "loading weights 40%"


class Ready(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    spec: EngineSpec
    gateway_cores: tuple[int, ...] = ()  # where the parent should run from now on; empty: anywhere


class StartFailed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    code: str  # errors.py's
    message: str


class Beat(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Sent twice a second while the engine serves, by a thread of its own (progress.py)."""

    turn_s: float  # how long the loop's turn has lasted
    stalled_s: float  # how long there has been no sign of progress


Announcement = Progress | Ready | StartFailed | Beat


_DECODER: msgspec.json.Decoder[Announcement] = msgspec.json.Decoder(type=Announcement)


def encode_line(announcement: Announcement) -> bytes:
    return msgspec.json.encode(announcement) + b"\n"


def decode_line(line: bytes) -> Announcement | None:
    """None: the line is something else, printed by a library."""
    try:
        return _DECODER.decode(line)
    except UNDECODABLE:
        return None
