"""Copies small arrays to the device from a ring of pinned buffers.

A step fills the array that `next_buffer` returns, and `send` starts its copy without waiting for it to end. A buffer is
written again three sends later; by then its copy is over, because at most two steps are in flight. Pinning fresh memory
for each copy would cost the host ten times as much as the copy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_NUM_BUFFERS = 3


class PinnedRing:
    """Mutable; owned by the sender, used on one stream. On a CPU the memory is not pinned and a copy is synchronous."""

    def __init__(self, device: torch.device, num_words: int = 0) -> None:
        """`num_words`: the initial size of a buffer, in 32-bit words; a larger array grows its buffer."""
        self._is_gpu = device.type == "cuda"
        self._memory = [self._allocate(num_words) for _ in range(_NUM_BUFFERS)]
        self._sent: list[torch.cuda.Event | None] = [None] * _NUM_BUFFERS
        self._current = 0
        self._num_words = 0

    def next_buffer(self, num_words: int) -> npt.NDArray[np.int32]:
        """Return `num_words` words of the next buffer, to be filled and sent; their content is stale."""
        self._current = (self._current + 1) % _NUM_BUFFERS
        self._num_words = num_words
        sent = self._sent[self._current]
        if sent is not None:
            sent.synchronize()
        if self._memory[self._current].numel() < num_words:
            self._memory[self._current] = self._allocate(2 * num_words)
        return self._memory[self._current].numpy()[:num_words]

    def send(self, out: Tensor) -> None:
        """Copy the words of the last `next_buffer` to `out`, int32 and contiguous, on the device."""
        out.copy_(self._memory[self._current][: self._num_words].view(out.shape), non_blocking=True)
        if self._is_gpu:
            sent = self._sent[self._current] or torch.cuda.Event()  # type: ignore[no-untyped-call]
            sent.record()
            self._sent[self._current] = sent

    def _allocate(self, num_words: int) -> Tensor:
        return torch.zeros(num_words, dtype=torch.int32, pin_memory=self._is_gpu)
