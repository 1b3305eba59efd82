"""The requests that a rank knows between their start and their end, and the state that their next tokens depend on.

Every rank keeps such a table: rank 0 and the followers, on CPUs and GPUs. All ranks get the same batches in the same
order, so their tables are equal. Each concern (sampling, scored prompts, constraints, shaping) has a `SlotState`,
indexed by slot; the state of a slot is undefined while the slot is closed.

The tokens that were sampled last are not here, but where the next step reads them (`Runner`, staging.py).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from kvist.grammar.compiler import GrammarCompiler
from kvist.kernels.shaping import TableSizes
from kvist.plan.batch import Batch, StartRequest
from kvist.plan.slots import OpenSlots
from kvist.request import SamplingParams, SlotId
from kvist.runner.answers import SlotAnswers
from kvist.runner.prompt_scores import SlotScoring
from kvist.runner.sampler import SamplingRow, hash_seeds, min_p_reach
from kvist.runner.shaping import SlotShaping


class SlotState(Protocol):
    """The state of one concern, for every slot."""

    def open(self, start: StartRequest) -> None:
        """Fill the state of a slot, which may contain the state of an earlier request."""

    def close(self, slot: SlotId) -> None:
        """Drop the state of a slot whose request has ended."""


class SlotSampling:
    """A `SlotState`: the sampling parameters, as objects and as columns."""

    def __init__(self, num_slots: int) -> None:
        self.temperatures = np.zeros(num_slots, dtype=np.float32)
        self.hashed_seeds = np.zeros(num_slots, dtype=np.uint64)
        self.top_k = np.zeros(num_slots, dtype=np.int32)
        self.top_p = np.zeros(num_slots, dtype=np.float32)
        self.reach = np.zeros(num_slots, dtype=np.float32)  # of min_p (`min_p_reach`)
        self.wants_logprobs = np.zeros(num_slots, dtype=np.bool_)
        self._params: dict[SlotId, SamplingParams] = {}

    def open(self, start: StartRequest) -> None:
        slot, params = start.slot, start.sampling
        self.temperatures[slot] = params.temperature
        self.hashed_seeds[slot] = hash_seeds([params.seed])[0]
        self.top_k[slot] = params.top_k
        self.top_p[slot] = params.top_p
        self.reach[slot] = min_p_reach(params)
        self.wants_logprobs[slot] = params.num_logprobs is not None
        self._params[slot] = params

    def close(self, slot: SlotId) -> None:
        del self._params[slot]

    def row(self, slot: SlotId, position: int) -> SamplingRow:
        """Return the parameters of the token at `position` of the slot's request."""
        return SamplingRow(params=self._params[slot], position=position)


class SlotTable:
    """Mutable; its one owner is the runner."""

    def __init__(self, sizes: TableSizes, device: torch.device, grammars: GrammarCompiler | None = None) -> None:
        """`grammars` compiles the constraints of requests; None: constrained requests fail."""
        self.num_slots = sizes.num_slots
        self.sampling = SlotSampling(sizes.num_slots)
        self.scoring = SlotScoring()
        self.shaping = SlotShaping(sizes, device, grammars)
        self._states: tuple[SlotState, ...] = (self.sampling, self.scoring, self.shaping)
        self.open_slots = OpenSlots()

    @property
    def answers(self) -> SlotAnswers:
        return self.shaping.answers

    def update(self, batch: Batch) -> None:
        """End and start the requests of the batch. Must be called before any part of the launch that can fail."""
        self.open_slots.update(batch)
        for slot in batch.ended:
            for state in self._states:
                state.close(slot)
        for start in batch.started:
            for state in self._states:
                state.open(start)
