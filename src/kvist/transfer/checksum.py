"""The checksum that both sides of a handoff compute: the writer over the pages it read, the receiver over the pages it
got.

The checksum folds page digests instead of hashing all bytes, so that it grows page by page while copying. The digest of
a page depends on the memory: xxh3_128 on the host, two sums on a GPU (kernels/pages.py). Both detect errors; neither
protects against a party that chooses the bytes.
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
        """Return 32 hex digits; zero pages have a checksum, too."""
        digest: str = self._fold.hexdigest()
        return digest


def fold(digests: Iterable[bytes]) -> str:
    running = RunningChecksum()
    running.add(digests)
    return running.hexdigest()
