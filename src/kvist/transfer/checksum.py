"""The checksum of a handoff: the writer computes it over the pages that it read, the receiver over the pages that
arrived.

The checksum is computed from the digests of the pages, one page after another while pages are copied. The digest of a
page depends on the kind of memory: xxh3_128 on the host, two sums on a GPU (kernels/pages.py). Both detect errors;
neither protects against an attacker who chooses the bytes.
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
        """Return 32 hex digits; also without any page."""
        digest: str = self._fold.hexdigest()
        return digest


def fold(digests: Iterable[bytes]) -> str:
    running = RunningChecksum()
    running.add(digests)
    return running.hexdigest()
