"""The checksum that both sides of a handoff compute: the writer over what it read, the receiver over what arrived.

A fold of page digests and not one hash over all bytes, so that it grows page by page while copying. What a page's
digest is depends on the memory: xxh3_128 on the host, two sums on a GPU (kernels/pages.py). Either is an error check,
not protection from somebody who chooses the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash


class RunningChecksum:
    """xxh3_128 over the digests of the pages, in the order they were added."""

    def __init__(self) -> None:
        self._fold = xxhash.xxh3_128()

    def add(self, digests: Iterable[bytes]) -> None:
        for digest in digests:
            self._fold.update(digest)

    def hexdigest(self) -> str:
        """32 hex digits; the checksum of no page at all is a value too."""
        digest: str = self._fold.hexdigest()
        return digest


def fold(digests: Iterable[bytes]) -> str:
    running = RunningChecksum()
    running.add(digests)
    return running.hexdigest()
