"""Sends a step's inputs to the GPU in one copy from pinned memory, and copies the sampled tokens back.

    words: token_ids T | sources T | positions T | rows R | slots R | parameters 5 R | keys 2 R     all 32 bits

On the device the words follow the last tokens: for each request slot, the token that was sampled last for its request.
`sources` points into both: a token that the host knows is read from `token_ids`, any other token from the last tokens.
The next step can thus be launched before the host has read the tokens of this step.

Every step uses the same device memory, in stream order; captured graphs rely on its address.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvist.attention.pinned import PinnedRing
from kvist.kernels.operands import SamplingColumns

PARAMETERS = ("temperatures", "top_k", "top_p", "reach", "flags")  # of a request; no step changes them
NUM_ROW_WORDS = 4 + len(PARAMETERS)  # of a row for which a token is sampled
_NUM_BUFFERS = 3  # two steps may be in flight


@dataclass(frozen=True, slots=True, kw_only=True)
class HostInputs:
    """A step's inputs before they are packed: T tokens; for R of them the next token is sampled."""

    token_ids: npt.NDArray[np.int32]  # [T]; undefined where the token is not known
    unknown: npt.NDArray[np.int64]  # the rows of T whose token is not known
    unknown_slots: npt.NDArray[np.int64]  # the request slots whose last tokens these are
    positions: npt.NDArray[np.int32]  # [T]
    rows: npt.NDArray[np.int64]  # [R]: the rows of T for which a token is sampled
    slots: npt.NDArray[np.int64]  # [R]: the request slots of these rows
    parameters: npt.NDArray[np.int32]  # [len(PARAMETERS), R]: their bits
    keys: npt.NDArray[np.int32] | None  # [R, 2]; None: all greedy

    def pack(self, words: npt.NDArray[np.int32], num_tokens: int, num_sampled: int, num_slots: int) -> None:
        """Fill `words` for a step padded to `num_tokens` and `num_sampled`. A padding row is token 0 at position 0,
        greedy, in the slot `num_slots`, which no request has."""
        count, sampled = len(self.token_ids), len(self.rows)
        token_ids, sources, positions = words[: 3 * num_tokens].reshape(3, num_tokens)
        tail = words[3 * num_tokens :].reshape(NUM_ROW_WORDS, num_sampled)
        rows, slots, parameters, keys = tail[0], tail[1], tail[2:-2], tail[-2:].reshape(num_sampled, 2)
        token_ids[:count] = self.token_ids
        sources[:] = np.arange(num_slots + 1, num_slots + 1 + num_tokens)
        sources[self.unknown] = self.unknown_slots
        positions[:count] = self.positions
        rows[:sampled] = self.rows
        slots[:sampled] = self.slots
        parameters[:, :sampled] = self.parameters
        if self.keys is not None:
            keys[:sampled] = self.keys
        for column, used in ((token_ids, count), (positions, count), (rows, sampled)):
            column[used:] = 0
        parameters[:, sampled:] = 0
        slots[sampled:] = num_slots


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInputs:
    """A step's inputs on the device, as views; int32 except `columns`."""

    known: Tensor  # last tokens and token_ids; `sources` points into it
    sources: Tensor  # [T]
    positions: Tensor  # [T]
    rows: Tensor  # [R]
    slots: Tensor  # [R]
    flags: Tensor  # [R], of `ShapedRows`
    columns: SamplingColumns

    def token_ids(self) -> Tensor:
        """Return [T]; last tokens are read in stream order. NO_TOKEN, of a row for which no token could be chosen, is
        read as token 0: the request fails when the host reads the result, and results computed from the 0 are
        dropped."""
        return self.known.index_select(0, self.sources).clamp_(min=0)


class Staging:
    """Mutable; owned by the runner, used on its one stream."""

    def __init__(self, *, num_slots: int, num_tokens: int, device: torch.device) -> None:
        """`num_slots`: the number of request slots, and the most tokens a step samples; `num_tokens`: the most tokens
        it computes."""
        self.num_slots = num_slots
        self.num_tokens = num_tokens
        self._first_word = num_slots + 1  # the last tokens come first: one per slot, and one for padding rows
        num_words = 3 * num_tokens + NUM_ROW_WORDS * num_slots
        self._device = torch.zeros(self._first_word + num_words, dtype=torch.int32, device=device)
        self._sampled = torch.zeros(num_slots, dtype=torch.int32, device=device)  # by the newest step, in its order
        self._ring = PinnedRing(device, num_words)
        is_gpu = device.type == "cuda"
        self._chosen = [torch.zeros(num_slots, dtype=torch.int32, pin_memory=is_gpu) for _ in range(_NUM_BUFFERS)]
        self._current = 0

    def views(self, num_tokens: int, num_sampled: int) -> DeviceInputs:
        """Return the views of a step with these numbers of tokens and rows; equal numbers give equal addresses."""
        words = self._device[self._first_word :]
        t, r = num_tokens, num_sampled
        keys = 3 * t + (NUM_ROW_WORDS - 2) * r
        rows, slots, *parameters = words[3 * t : keys].view(NUM_ROW_WORDS - 2, r)
        by_name = dict(zip(PARAMETERS, parameters, strict=True))
        return DeviceInputs(
            known=self._device[: self._first_word + t],
            sources=words[t : 2 * t],
            positions=words[2 * t : 3 * t],
            rows=rows,
            slots=slots,
            flags=by_name["flags"],
            columns=SamplingColumns(
                temperatures=by_name["temperatures"].view(torch.float32),
                keys=words[keys : keys + 2 * r].view(r, 2),
                top_k=by_name["top_k"],
                top_p=by_name["top_p"].view(torch.float32),
                reach=by_name["reach"].view(torch.float32),
            ),
        )

    def send(self, host: HostInputs, num_tokens: int, num_sampled: int) -> None:
        """Fill the views of (num_tokens, num_sampled). Rows beyond those of `host` are padding."""
        assert len(host.token_ids) <= num_tokens <= self.num_tokens, "the batch is above the token budget"
        assert len(host.rows) <= num_sampled <= self.num_slots, "the batch has too many requests"
        num_words = 3 * num_tokens + NUM_ROW_WORDS * num_sampled
        host.pack(self._ring.next_buffer(num_words), num_tokens, num_sampled, self.num_slots)
        self._ring.send(self._device[self._first_word : self._first_word + num_words])

    def write_sampled(self, chosen: Tensor, slots: Tensor) -> None:
        """Write `chosen` [n] int64, the tokens of a step: for `start_read`, and as the last tokens of `slots` [n]
        int32. Does not involve the host, so that it can be captured in a graph."""
        sampled = self._sampled[: chosen.shape[0]]
        sampled.copy_(chosen)
        self._device.index_copy_(0, slots.long(), sampled)

    def sampled(self, num_sampled: int) -> Tensor:
        """Return the tokens of the newest step, [num_sampled] int32 on the device."""
        return self._sampled[:num_sampled]

    def start_read(self, num_sampled: int) -> Tensor:
        """Start the copy of the sampled tokens; return [num_sampled] int32 on the host. The values are valid once the
        stream has reached this point, and are overwritten three steps later."""
        self._current = (self._current + 1) % _NUM_BUFFERS
        chosen = self._chosen[self._current][:num_sampled]
        chosen.copy_(self._sampled[:num_sampled], non_blocking=True)
        return chosen
