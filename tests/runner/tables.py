"""Slot tables on a CPU, for tests without a model."""

from __future__ import annotations

import torch

from kvist.runner.shaping import table_sizes
from kvist.runner.slots import SlotTable


def small_table(num_slots: int, *, vocab_size: int = 1000) -> SlotTable:
    return SlotTable(table_sizes(num_slots, vocab_size=vocab_size, context_len=4096), torch.device("cpu"))
