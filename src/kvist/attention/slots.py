"""Where the new tokens of a step go, for kernels that write to pages by slot number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvist.attention.backend import Span


def written_slots(spans: Sequence[Span], page_size: int) -> list[int]:
    """page * page_size + offset of every new token, in order."""
    slots: list[int] = []
    for span in spans:
        first, offset = divmod(span.start, page_size)
        if span.num_tokens == 1:  # most spans: no arrays for one number
            slots.append(span.page_ids[first] * page_size + offset)
            continue
        pages = np.asarray(span.page_ids[first : -(-span.end // page_size)], dtype=np.int64)
        positions = np.arange(span.start, span.end)
        slots += (pages[positions // page_size - first] * page_size + positions % page_size).tolist()
    return slots
