"""The requests that a rank knows between their start and their end, and the state that their next tokens depend on.

Every rank keeps such a table: rank 0 and the followers, on CPUs and GPUs. All ranks get the same batches in the same
order, so their tables are equal. A state of its own (`SlotState`) is kept for each concern and indexed by slot; the
state of a slot is undefined while the slot is closed.

Not here: the tokens that were sampled last, which live where the next step reads them (`Runner`, staging.py).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from kvist.plan.batch import Batch, StartRequest
from kvist.plan.slots import OpenSlots
from kvist.request import SamplingParams, SlotId
from kvist.runner.prompt_scores import SlotScoring
from kvist.runner.sampler import SamplingRow, hash_seeds, is_plain


class SlotState(Protocol):
    """The state of one concern, for every slot."""

    def open(self, start: StartRequest) -> None:
        """Fill the state of a slot; an earlier request may have left its own there."""

    def close(self, slot: SlotId) -> None:
        """Drop the state of a slot whose request has ended."""


class SlotSampling:
    """A `SlotState`: the sampling parameters, as objects and as columns."""

    def __init__(self, num_slots: int) -> None:
        self.temperatures = np.zeros(num_slots, dtype=np.float32)
        self.hashed_seeds = np.zeros(num_slots, dtype=np.uint64)
        self.suppress_until = np.zeros(num_slots, dtype=np.int32)  # 0: no token is suppressed
        self.is_plain = np.zeros(num_slots, dtype=np.bool_)  # apart from suppressed tokens
        self._params: dict[SlotId, SamplingParams] = {}
        self._suppressed_token_ids: dict[SlotId, tuple[int, ...]] = {}

    def open(self, start: StartRequest) -> None:
        slot, params = start.slot, start.sampling
        self.temperatures[slot] = params.temperature
        self.hashed_seeds[slot] = hash_seeds([params.seed])[0]
        self.suppress_until[slot] = start.suppress_until
        self.is_plain[slot] = is_plain(params)
        self._params[slot] = params
        self._suppressed_token_ids[slot] = start.suppressed_token_ids

    def close(self, slot: SlotId) -> None:
        del self._params[slot], self._suppressed_token_ids[slot]

    def row(self, slot: SlotId, position: int) -> SamplingRow:
        """Return the parameters of the token at `position` of the slot's request."""
        suppresses = position < self.suppress_until[slot]
        return SamplingRow(
            params=self._params[slot],
            position=position,
            suppressed_token_ids=self._suppressed_token_ids[slot] if suppresses else (),
        )


class SlotTable:
    """Mutable; its one owner is the runner."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.sampling = SlotSampling(num_slots)
        self.scoring = SlotScoring()
        self._states: tuple[SlotState, ...] = (self.sampling, self.scoring)
        self.open = OpenSlots()

    def update(self, batch: Batch) -> None:
        """End and start the batch's requests; to be called before anything of its launch can fail."""
        self.open.update(batch)
        for slot in batch.ended:
            for state in self._states:
                state.close(slot)
        for start in batch.started:
            for state in self._states:
                state.open(start)
