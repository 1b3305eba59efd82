"""The pieces in which pages travel between engines of different tensor parallelism. Pure.

A page has its heads first (kv/layout.py), so the heads of one rank are a part of the page: a range of its bytes. Ranks
may have equal parts, if there are more ranks than KV heads.

    our parts    | rank 0, rank 1 |     rank 2     |      more ranks than heads: two ranks have the same part
    their parts  |  rank 0   |  rank 1  |  rank 2  |
    pieces       |    a      | b |  c   |    d     |      what one of our parts and one of theirs have in common

Of our equal parts the first one is read; each of theirs is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvist.errors import Unavailable


class PagePart(Protocol):
    """The part of every page that one rank has: `wire.PoolPart`, or memory."""

    @property
    def offset(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A range of bytes of every page, and the two parts that have it."""

    offset: int  # in the page
    num_bytes: int
    source: int  # index of our part
    source_offset: int  # in that part
    target: int  # index of the peer's part
    target_offset: int
    repeats: bool  # an earlier piece has the same bytes, for another rank of the peer


def pieces(source: Sequence[PagePart], target: Sequence[PagePart], page_bytes: int) -> tuple[Piece, ...]:
    """Return the pieces that fill all parts of the target, each byte once. The pieces without `repeats` are one
    whole page. Raises `Unavailable` if the parts of one side do not make up a page."""
    first_targets, first_sources = distinct_parts(target, page_bytes), distinct_parts(source, page_bytes)
    found: list[Piece] = []
    for index, theirs in enumerate(target):
        for number in first_sources:
            ours = source[number]
            start = max(ours.offset, theirs.offset)
            end = min(ours.offset + ours.num_bytes, theirs.offset + theirs.num_bytes)
            if start < end:
                found.append(
                    Piece(
                        offset=start,
                        num_bytes=end - start,
                        source=number,
                        source_offset=start - ours.offset,
                        target=index,
                        target_offset=start - theirs.offset,
                        repeats=index not in first_targets,
                    )
                )
    return tuple(found)


def distinct_parts(parts: Sequence[PagePart], page_bytes: int) -> tuple[int, ...]:
    """Return the indices of parts that together are one page, in its order: of equal parts the first one. Raises
    `Unavailable` if no parts are."""
    first: dict[tuple[int, int], int] = {}
    for index, part in enumerate(parts):
        first.setdefault((part.offset, part.num_bytes), index)
    end = 0
    for offset, num_bytes in sorted(first):
        if offset != end or num_bytes < 1:
            break
        end += num_bytes
    else:
        if end == page_bytes:
            return tuple(first[key] for key in sorted(first))
    shown = ", ".join(f"{part.offset}+{part.num_bytes}" for part in parts[:8])
    raise Unavailable(f"the parts of the ranks ({shown}) do not make up a page of {page_bytes} bytes")
