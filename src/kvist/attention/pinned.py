"""Small arrays on their way to the device, out of pinned memory that is used in turns.

A step writes its numbers into `words`, and `send` starts their copy without waiting for it. The memory of a turn is
written again three sends later, when its copy is surely over: two steps may be under way. Pinning fresh memory for each
copy would cost the host ten times as much as the copy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_TURNS = 3


class PinnedRing:
    """Mutable; owned by who sends, used on one stream. On a CPU the memory is plain and a copy is over at once."""

    def __init__(self, device: torch.device, num_words: int = 0) -> None:
        """`num_words`: make room for so many now; a larger array makes room for itself."""
        self._is_gpu = device.type == "cuda"
        self._memory = [self._allocate(num_words) for _ in range(_TURNS)]
        self._sent: list[torch.cuda.Event | None] = [None] * _TURNS
        self._turn = 0
        self._num_words = 0

    def words(self, num_words: int) -> npt.NDArray[np.int32]:
        """The next turn's memory, to be filled and sent; what it holds is old."""
        self._turn = (self._turn + 1) % _TURNS
        self._num_words = num_words
        sent = self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        if self._memory[self._turn].numel() < num_words:
            self._memory[self._turn] = self._allocate(2 * num_words)
        return self._memory[self._turn].numpy()[:num_words]

    def send(self, out: Tensor) -> None:
        """Into `out`, int32 and contiguous, on the device: as many words as were asked for."""
        out.copy_(self._memory[self._turn][: self._num_words].view(out.shape), non_blocking=True)
        if self._is_gpu:
            sent = self._sent[self._turn] or torch.cuda.Event()  # type: ignore[no-untyped-call]
            sent.record()
            self._sent[self._turn] = sent

    def _allocate(self, num_words: int) -> Tensor:
        return torch.zeros(num_words, dtype=torch.int32, pin_memory=self._is_gpu)
