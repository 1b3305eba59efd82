"""What one step sends to the GPU, as one copy out of pinned memory, and what it takes back.

    words: token_ids T | sources T | positions T | rows R | temperatures R (fp32) | keys 2 R       all 32 bits

On the device the words follow `num_rows` slots that hold the tokens chosen by the step before, in its order. `sources`
points into both: a token that the host knows is read from `token_ids`, one that it does not from its slot. So the next
step can be launched before anybody has seen what this one chose.

Every step uses the same device memory, in stream order; captured graphs rely on its address. The pinned memory is used
in turns, each free again when its copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_TURNS = 3  # two steps may be under way


@dataclass(frozen=True, slots=True, kw_only=True)
class HostWords:
    """A step's words before they are sent. Lists of T or R entries."""

    token_ids: Sequence[int]  # anything where the token is not known
    unknown: Sequence[int]  # which of T are not known, and ...
    slots: Sequence[int]  # ... the slots of the step before that have them
    positions: Sequence[int]
    rows: Sequence[int]  # which of T a token is chosen for
    temperatures: Sequence[float]
    keys: npt.NDArray[np.int32] | None  # [R, 2]; None: all greedy


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
        """[T]; reads the slots as they are when it runs."""
        return self.known.index_select(0, self.sources)


class Staging:
    """Mutable; owned by the runner, used on its one stream."""

    def __init__(self, *, num_rows: int, num_tokens: int, device: torch.device) -> None:
        """`num_rows`: the most tokens a step chooses; `num_tokens`: the most it computes."""
        self.num_rows = num_rows
        self.num_tokens = num_tokens
        num_words = 3 * num_tokens + 4 * num_rows
        self._device = torch.zeros(num_rows + num_words, dtype=torch.int32, device=device)
        self._pinned = [torch.zeros(num_words, dtype=torch.int32, pin_memory=True) for _ in range(_TURNS)]
        self._words = [pinned.numpy() for pinned in self._pinned]
        self._chosen = [torch.zeros(num_rows, dtype=torch.int32, pin_memory=True) for _ in range(_TURNS)]
        self._sent = [torch.cuda.Event() for _ in range(_TURNS)]  # type: ignore[no-untyped-call]
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
        count, sampled = len(host.token_ids), len(host.rows)
        assert count <= num_tokens <= self.num_tokens, "the batch is above the token budget"
        assert sampled <= num_sampled <= self.num_rows, "the batch has too many requests"
        self._turn = (self._turn + 1) % _TURNS
        self._sent[self._turn].synchronize()
        words, t, r = self._words[self._turn], num_tokens, num_sampled
        tail = 3 * t
        words[:count] = host.token_ids
        words[count:t] = 0
        words[t : 2 * t] = np.arange(self.num_rows, self.num_rows + t)
        if host.slots:
            words[t : 2 * t][np.array(host.unknown)] = host.slots
        words[2 * t : 2 * t + count] = host.positions
        words[2 * t + count : tail] = 0
        words[tail : tail + sampled] = host.rows
        words[tail + r : tail + 2 * r] = 0
        words[tail + r : tail + r + sampled].view(np.float32)[:] = host.temperatures
        if host.keys is not None:
            words[tail + 2 * r : tail + 2 * r + 2 * sampled] = host.keys.reshape(-1)
        num_words = tail + 4 * r
        target = self._device[self.num_rows : self.num_rows + num_words]
        target.copy_(self._pinned[self._turn][:num_words], non_blocking=True)
        self._sent[self._turn].record()

    def keep(self, chosen: Tensor) -> None:
        """chosen [n] int64 -> the slots, for the next step."""
        self._device[: chosen.shape[0]].copy_(chosen)

    def start_read(self, num_sampled: int) -> Tensor:
        """[num_sampled] int32 on the host, right once the stream has got here; overwritten two steps later."""
        chosen = self._chosen[self._turn][:num_sampled]
        chosen.copy_(self._device[:num_sampled], non_blocking=True)
        return chosen
