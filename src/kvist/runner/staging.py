"""What one step sends to the GPU, as one copy out of pinned memory, and what it takes back.

    words: token_ids T | sources T | positions T | rows R | temperatures R (fp32) | keys 2 R       all 32 bits

On the device the words follow `num_rows` slots that hold the tokens chosen by the step before, in its order. `sources`
points into both: a token that the host knows is read from `token_ids`, one that it does not from its slot. So the next
step can be launched before anybody has seen what this one chose.

Every step uses the same device memory, in stream order; captured graphs rely on its address.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvist.attention.pinned import PinnedRing

_TURNS = 3  # two steps may be under way


@dataclass(frozen=True, slots=True, kw_only=True)
class HostWords:
    """A step's words before they are sent, of T tokens, R of which get another."""

    token_ids: npt.NDArray[np.int32]  # [T]; anything where the token is not known
    unknown: npt.NDArray[np.int64]  # which of T are not known, and ...
    slots: npt.NDArray[np.int64]  # ... the slots of the step before that have them
    positions: npt.NDArray[np.int32]  # [T]
    rows: npt.NDArray[np.int64]  # [R]: which of T a token is chosen for
    temperatures: npt.NDArray[np.float32]  # [R]
    keys: npt.NDArray[np.int32] | None  # [R, 2]; None: all greedy

    def pack(self, words: npt.NDArray[np.int32], num_tokens: int, num_sampled: int, num_slots: int) -> None:
        """Fill `words` for a step of `num_tokens` and `num_sampled`; what we have less than that is padding: token 0
        at position 0, greedy."""
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
class DeviceWords:
    """The same on the device, as views; int32 but for the temperatures."""

    known: Tensor  # slots and token_ids, what `sources` points into
    sources: Tensor  # [T]
    positions: Tensor  # [T]
    rows: Tensor  # [R]
    temperatures: Tensor  # [R] fp32
    keys: Tensor  # [R, 2]

    def token_ids(self) -> Tensor:
        """[T]; reads the slots as they are when it runs. A slot without a token (NO_TOKEN) counts as token 0: what is
        computed from it belongs to a request that fails once the host has seen the slot."""
        return self.known.index_select(0, self.sources).clamp_(min=0)


class Staging:
    """Mutable; owned by the runner, used on its one stream."""

    def __init__(self, *, num_rows: int, num_tokens: int, device: torch.device) -> None:
        """`num_rows`: the most tokens a step chooses; `num_tokens`: the most it computes."""
        self.num_rows = num_rows
        self.num_tokens = num_tokens
        self._device = torch.zeros(num_rows + 3 * num_tokens + 4 * num_rows, dtype=torch.int32, device=device)
        self._ring = PinnedRing(device, 3 * num_tokens + 4 * num_rows)
        is_gpu = device.type == "cuda"
        self._chosen = [torch.zeros(num_rows, dtype=torch.int32, pin_memory=is_gpu) for _ in range(_TURNS)]
        self._turn = 0

    def views(self, num_tokens: int, num_sampled: int) -> DeviceWords:
        """Of a step with so many tokens and rows; the same numbers give the same addresses."""
        words = self._device[self.num_rows :]
        t, r = num_tokens, num_sampled
        tail = 3 * t
        return DeviceWords(
            known=self._device[: self.num_rows + t],
            sources=words[t : 2 * t],
            positions=words[2 * t : tail],
            rows=words[tail : tail + r],
            temperatures=words[tail + r : tail + 2 * r].view(torch.float32),
            keys=words[tail + 2 * r : tail + 4 * r].view(r, 2),
        )

    def send(self, host: HostWords, num_tokens: int, num_sampled: int) -> None:
        """Fill the views of (num_tokens, num_sampled), which may be more than `host` has: the rest is padding."""
        assert len(host.token_ids) <= num_tokens <= self.num_tokens, "the batch is above the token budget"
        assert len(host.rows) <= num_sampled <= self.num_rows, "the batch has too many requests"
        num_words = 3 * num_tokens + 4 * num_sampled
        host.pack(self._ring.words(num_words), num_tokens, num_sampled, self.num_rows)
        self._ring.send(self._device[self.num_rows : self.num_rows + num_words])

    def keep(self, chosen: Tensor) -> None:
        """chosen [n] int64 -> the slots, for the next step."""
        self._device[: chosen.shape[0]].copy_(chosen)

    def start_read(self, num_sampled: int) -> Tensor:
        """[num_sampled] int32 on the host, right once the stream has got here; overwritten three steps later."""
        self._turn = (self._turn + 1) % _TURNS
        chosen = self._chosen[self._turn][:num_sampled]
        chosen.copy_(self._device[:num_sampled], non_blocking=True)
        return chosen
