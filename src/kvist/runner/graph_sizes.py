"""For which batch sizes decode is recorded, and what that costs. Knows no GPU, so that a pool can be planned."""

from __future__ import annotations


def padded_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, then every multiple of 8, the last one cut to `max_batch`."""
    sizes = [size for size in (1, 2, 4) if size < max_batch]
    return [*sizes, *range(8, max_batch, 8), max_batch]


def graphs_bytes(max_batch: int) -> int:
    """Device memory of all recordings, before there is a model: the driver keeps each graph's nodes there."""
    return (256 << 20) + len(padded_sizes(max_batch)) * (16 << 20)
