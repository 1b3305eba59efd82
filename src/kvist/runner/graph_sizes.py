"""For which numbers of rows steps are recorded, and what that costs. Knows no GPU, so that a pool can be planned."""

from __future__ import annotations

MAX_MIXED_TOKENS = 2048  # such a step takes an H200 45 ms (7B), so launching it kernel by kernel holds up nothing
_BYTES_A_GRAPH = 16 << 20  # the driver keeps each graph's nodes in device memory


def decode_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, then every multiple of 8, above 256 of more and more (a recording each would fill the GPU), the last one
    cut to `max_batch`."""
    sizes, size = [1, 2, 4], 8
    while size < max_batch:
        sizes.append(size)
        size += max(8, (1 << size.bit_length()) >> 5)
    return [*(size for size in sizes if size < max_batch), max_batch]


def mixed_sizes(max_tokens: int) -> list[int]:
    """Steps an eighth apart at most, wider where a product takes as long for fewer rows, up to `max_tokens` or
    `MAX_MIXED_TOKENS`."""
    most = min(max_tokens, MAX_MIXED_TOKENS)
    steps = (*range(16, 128, 16), *range(128, 256, 32), *range(256, 512, 64), *range(512, MAX_MIXED_TOKENS, 128))
    return [*(size for size in steps if size < most), most]


def graphs_bytes(max_batch: int, max_tokens: int, vocab_size: int) -> int:
    """Device memory of all recordings, before there is a model. `max_tokens`: 0 without recordings of mixed steps."""
    num_graphs = len(decode_sizes(max_batch)) + (len(mixed_sizes(max_tokens)) if max_tokens else 0)
    logits_bytes = max_batch * vocab_size * 4  # fp32; the largest recording of decodes keeps its own
    return (256 << 20) + num_graphs * _BYTES_A_GRAPH + logits_bytes
