"""Pages in GPU memory, copied and summed by one kernel (kernels/pages.py) on a stream beside the model's.

The stream waits for nobody. A page to be copied was computed by a step whose tokens the host has read (only those count
as computed, with overlap too: `ActiveRequest.num_computed`), and that reading waited for the whole step. A page to be
verified was written before its writer, who had waited for its own stream, said Done. Nor does the model's stream wait
for this one: what is reported to the loop is reported after this stream was waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvist.kernels.operands import WORD_BYTES
from kvist.kernels.pages import copy_pages, sum_pages

GROUP_BYTES = 64 << 20  # copied between two looks whether to stop: a third of a millisecond


class Mapped(Protocol):
    """A peer's pages."""

    @property
    def address(self) -> int:
        """Where kernels of our GPU write; valid for as long as this object lives."""


class DevicePages:
    """An engine's own pages, as `jobs.OwnPages`. Used by one thread at a time. On a CPU it runs the kernel's twin."""

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
        # Compiles both kernels now, and not under the first request: page 0 onto itself.
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
        """Also makes its GPU the thread's current one."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _digests(sums: Tensor) -> list[bytes]:
    """Waits for the stream. sums [num_pages, 2] int64."""
    return [row.tobytes() for row in sums.cpu().numpy()]
