"""The checksum that both sides of a handoff compute: the writer over what it read, the receiver over what arrived.

A fold of page digests and not one hash over all bytes, so that it grows page by page while copying.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

Pages = npt.NDArray[np.uint8]  # [num_pages, page_bytes], C-contiguous rows


class RunningChecksum:
    """xxh3_128 over the xxh3_128 digests of the pages, in the order they were added."""

    def __init__(self) -> None:
        self._fold = xxhash.xxh3_128()

    def add(self, page: Pages) -> None:
        """`page` is one row of a pool: [page_bytes], contiguous."""
        self._fold.update(xxhash.xxh3_128_digest(page.data))

    def hexdigest(self) -> str:
        """32 hex digits; the checksum of no page at all is a value too."""
        digest: str = self._fold.hexdigest()
        return digest


def checksum_pages(pages: Pages, page_ids: tuple[int, ...]) -> str:
    running = RunningChecksum()
    for page_id in page_ids:
        running.add(pages[page_id])
    return running.hexdigest()
