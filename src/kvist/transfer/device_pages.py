"""Pages in GPU memory, copied and summed by our kernels (kernels/pages.py) on a stream beside the model's stream.

This stream does not need to wait for another stream. A page to be copied was computed by a step whose tokens the host
has read (only such pages count as computed, also with overlap: `ActiveRequest.num_computed`), and that read waited for
the whole step. A page to be verified was written before its writer, which had waited for its own stream, sent Done. The
model's stream does not need to wait for this stream: a job is reported only after this stream has finished it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvist.kernels.operands import WORD_BYTES
from kvist.kernels.pages import copy_pages, sum_pages

GROUP_BYTES = 64 << 20  # copied between two checks for a stop: a third of a millisecond


class Mapped(Protocol):
    """A peer's mapped pages."""

    @property
    def address(self) -> int:
        """The address for kernels of our GPU; valid for the lifetime of this object."""


class DevicePages:
    """An engine's own pages, as `jobs.OwnPages`. Used by one thread at a time. On a CPU the kernel's twin runs."""

    def __init__(self, pool: Tensor) -> None:
        """`pool` [num_pages, ...], contiguous."""
        page_bytes = pool[0].nbytes
        assert page_bytes % WORD_BYTES == 0, "K and V of an even head_dim make whole words"
        self._words = pool.view(pool.shape[0], -1).view(torch.int64)
        self._stream: torch.cuda.Stream | None = None
        if pool.is_cuda:
            self._stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(pool.device))
        self.pages_at_once = max(1, GROUP_BYTES // page_bytes)
        # Compile both kernels now and not during the first request, by copying page 0 onto itself.
        with self._on_stream():
            _digests(copy_pages(self._words, (0,), self._words.data_ptr(), (0,)))
        self.digests((0,))

    def copy(self, page_ids: Sequence[int], peer: Mapped, peer_page_ids: Sequence[int]) -> list[bytes]:
        with self._on_stream():
            return _digests(copy_pages(self._words, page_ids, peer.address, peer_page_ids))

    def digests(self, page_ids: Sequence[int]) -> list[bytes]:
        with self._on_stream():
            return _digests(sum_pages(self._words, page_ids))

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        """Enter the stream, which also makes its GPU the current device of the thread."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _digests(sums: Tensor) -> list[bytes]:
    """Return one digest per page of sums [num_pages, 2] int64. Waits for the stream."""
    return [row.tobytes() for row in sums.cpu().numpy()]
