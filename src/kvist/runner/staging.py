"""Sends a step's inputs to the GPU in one copy from pinned memory, and copies the sampled tokens back.

    words: token_ids T | sources T | positions T | rows R | temperatures R (fp32) | keys 2 R       all 32 bits

On the device the words follow `num_rows` slots that hold the tokens sampled by the previous step, in its order.
`sources` points into both: a token that the host knows is read from `token_ids`, any other token from its slot. The
next step can thus be launched before the host has read the tokens of this step.

Every step uses the same device memory, in stream order; captured graphs rely on its address.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvist.attention.pinned import PinnedRing

_NUM_BUFFERS = 3  # two steps may be in flight


@dataclass(frozen=True, slots=True, kw_only=True)
class HostInputs:
    """A step's inputs before they are packed: T tokens; for R of them the next token is sampled."""

    token_ids: npt.NDArray[np.int32]  # [T]; undefined where the token is not known
    unknown: npt.NDArray[np.int64]  # the rows of T whose token is not known
    slots: npt.NDArray[np.int64]  # the slots of the previous step that hold those tokens
    positions: npt.NDArray[np.int32]  # [T]
    rows: npt.NDArray[np.int64]  # [R]: the rows of T for which a token is sampled
    temperatures: npt.NDArray[np.float32]  # [R]
    keys: npt.NDArray[np.int32] | None  # [R, 2]; None: all greedy

    def pack(self, words: npt.NDArray[np.int32], num_tokens: int, num_sampled: int, num_slots: int) -> None:
        """Fill `words` for a step padded to `num_tokens` and `num_sampled`; a padding row is token 0 at position 0,
        greedy."""
        count, sampled = len(self.token_ids), len(self.rows)
        token_ids, sources, positions = words[: 3 * num_tokens].reshape(3, num_tokens)
        tail = words[3 * num_tokens :].reshape(4, num_sampled)
        rows, temperatures, keys = tail[0], tail[1], tail[2:].reshape(num_sampled, 2)
        token_ids[:count] = self.token_ids
        sources[:] = np.arange(num_slots, num_slots + num_tokens)
        sources[self.unknown] = self.slots
        positions[:count] = self.positions
        rows[:sampled] = self.rows
        temperatures[:sampled] = self.temperatures.view(np.int32)
        if self.keys is not None:
            keys[:sampled] = self.keys
        for column, used in ((token_ids, count), (positions, count), (rows, sampled), (temperatures, sampled)):
            column[used:] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInputs:
    """A step's inputs on the device, as views; int32 except the temperatures."""

    known: Tensor  # slots and token_ids; `sources` points into it
    sources: Tensor  # [T]
    positions: Tensor  # [T]
    rows: Tensor  # [R]
    temperatures: Tensor  # [R] fp32
    keys: Tensor  # [R, 2]

    def token_ids(self) -> Tensor:
        """Return [T], read from the slots in stream order. A slot without a token (NO_TOKEN) counts as token 0: its
        request fails as soon as the host has read the slot, and the result is dropped."""
        return self.known.index_select(0, self.sources).clamp_(min=0)


class Staging:
    """Mutable; owned by the runner, used on its one stream."""

    def __init__(self, *, num_rows: int, num_tokens: int, device: torch.device) -> None:
        """`num_rows`: the most tokens a step samples; `num_tokens`: the most it computes."""
        self.num_rows = num_rows
        self.num_tokens = num_tokens
        self._device = torch.zeros(num_rows + 3 * num_tokens + 4 * num_rows, dtype=torch.int32, device=device)
        self._ring = PinnedRing(device, 3 * num_tokens + 4 * num_rows)
        is_gpu = device.type == "cuda"
        self._chosen = [torch.zeros(num_rows, dtype=torch.int32, pin_memory=is_gpu) for _ in range(_NUM_BUFFERS)]
        self._current = 0

    def views(self, num_tokens: int, num_sampled: int) -> DeviceInputs:
        """Return the views of a step with these numbers of tokens and rows; equal numbers give equal addresses."""
        words = self._device[self.num_rows :]
        t, r = num_tokens, num_sampled
        tail = 3 * t
        return DeviceInputs(
            known=self._device[: self.num_rows + t],
            sources=words[t : 2 * t],
            positions=words[2 * t : tail],
            rows=words[tail : tail + r],
            temperatures=words[tail + r : tail + 2 * r].view(torch.float32),
            keys=words[tail + 2 * r : tail + 4 * r].view(r, 2),
        )

    def send(self, host: HostInputs, num_tokens: int, num_sampled: int) -> None:
        """Fill the views of (num_tokens, num_sampled). Rows beyond those of `host` are padding."""
        assert len(host.token_ids) <= num_tokens <= self.num_tokens, "the batch is above the token budget"
        assert len(host.rows) <= num_sampled <= self.num_rows, "the batch has too many requests"
        num_words = 3 * num_tokens + 4 * num_sampled
        host.pack(self._ring.next_buffer(num_words), num_tokens, num_sampled, self.num_rows)
        self._ring.send(self._device[self.num_rows : self.num_rows + num_words])

    def write_sampled(self, chosen: Tensor) -> None:
        """Write chosen [n] int64 to the slots, for the next step."""
        self._device[: chosen.shape[0]].copy_(chosen)

    def start_read(self, num_sampled: int) -> Tensor:
        """Start the copy of the sampled tokens; return [num_sampled] int32 on the host. The values are valid once the
        stream has reached this point, and are overwritten three steps later."""
        self._current = (self._current + 1) % _NUM_BUFFERS
        chosen = self._chosen[self._current][:num_sampled]
        chosen.copy_(self._device[:num_sampled], non_blocking=True)
        return chosen
