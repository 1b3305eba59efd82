"""The checksum of a handoff: the writer computes it over the pages that it read, the receiver over the pages that
arrived.

The checksum is computed from the digests of the pages, one page after another while pages are copied. The digest of a
page depends on the kind of memory: xxh3_128 on the host, two sums on a GPU (kernels/pages.py). Both detect errors;
neither protects against an attacker who chooses the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

PAGE_DIGEST_BYTES = 8  # of a page's digest, sent to find the page that differs; the checksum proves equality


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


def shortened(digests: Iterable[bytes]) -> bytes:
    """Return the first `PAGE_DIGEST_BYTES` of each digest, joined."""
    return b"".join(digest[:PAGE_DIGEST_BYTES] for digest in digests)


def num_equal(ours: bytes, theirs: bytes) -> int:
    """Return how many leading pages have equal digests in two results of `shortened`; 0 if their lengths differ."""
    if len(ours) != len(theirs):
        return 0
    starts = range(0, len(ours), PAGE_DIGEST_BYTES)
    differing = (at for at in starts if ours[at : at + PAGE_DIGEST_BYTES] != theirs[at : at + PAGE_DIGEST_BYTES])
    return next(differing, len(ours)) // PAGE_DIGEST_BYTES


def fold(digests: Iterable[bytes]) -> str:
    running = RunningChecksum()
    running.add(digests)
    return running.hexdigest()
