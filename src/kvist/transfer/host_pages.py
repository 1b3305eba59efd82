"""Pages in host memory, copied and checksummed by the CPU without Python's lock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

Pages = npt.NDArray[np.uint8]  # [num_pages, page_bytes], C-contiguous rows


class HostPages:
    """An engine's own pages, as `jobs.OwnPages`; a peer's pages are an array of the same form."""

    pages_at_once = 1

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def copy(self, page_ids: Sequence[int], peer: Pages, peer_page_ids: Sequence[int]) -> list[bytes]:
        for page_id, peer_page_id in zip(page_ids, peer_page_ids, strict=True):
            np.copyto(peer[peer_page_id], self._pages[page_id])
        return self.digests(page_ids)

    def digests(self, page_ids: Sequence[int]) -> list[bytes]:
        return digests_of(self._pages[page_id] for page_id in page_ids)


def digests_of(rows: Iterable[Pages]) -> list[bytes]:
    """Return the digest of each page [page_bytes]."""
    return [xxhash.xxh3_128_digest(row.data) for row in rows]
