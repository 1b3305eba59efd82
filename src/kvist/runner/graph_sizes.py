"""The numbers of rows for which steps are captured, and the memory of their graphs. Needs no GPU."""

from __future__ import annotations

MAX_MIXED_TOKENS = 2048  # 45 ms on an H200 (7B); launching a larger step kernel by kernel is not slower
_SAMPLING_BYTES_A_ROW = 64 << 10  # bins and lists of kernels/gpu/sampling.py
_BYTES_A_GRAPH = 16 << 20  # the driver keeps the nodes of each graph in device memory
_BYTES_A_CHOICE = 1 << 20  # the same of a graph that chooses the tokens of a decode step: a few nodes


def decode_sizes(max_batch: int) -> list[int]:
    """Return 1, 2, 4, then every multiple of 8; above 256 the distances grow, because a graph for each multiple of 8
    would fill the GPU. The last size is `max_batch`."""
    sizes, size = [1, 2, 4], 8
    while size < max_batch:
        sizes.append(size)
        size += max(8, (1 << size.bit_length()) >> 5)
    return [*(size for size in sizes if size < max_batch), max_batch]


def mixed_sizes(max_tokens: int) -> list[int]:
    """Return sizes up to `max_tokens` or `MAX_MIXED_TOKENS`, at most an eighth apart, and wider where a matrix product
    takes as long for fewer rows."""
    most = min(max_tokens, MAX_MIXED_TOKENS)
    steps = (*range(16, 128, 16), *range(128, 256, 32), *range(256, 512, 64), *range(512, MAX_MIXED_TOKENS, 128))
    return [*(size for size in steps if size < most), most]


def graphs_bytes(max_batch: int, max_tokens: int, vocab_size: int) -> int:
    """Return an estimate of the device memory of all graphs, made before the model is loaded. `max_tokens`: 0 without
    graphs of mixed steps."""
    num_choices = len(decode_sizes(max_batch))
    num_graphs = num_choices + (len(mixed_sizes(max_tokens)) if max_tokens else 0)
    nodes_bytes = num_graphs * _BYTES_A_GRAPH + num_choices * _BYTES_A_CHOICE
    # the largest choice keeps its own logits, in fp32
    return (256 << 20) + nodes_bytes + max_batch * (vocab_size * 4 + _SAMPLING_BYTES_A_ROW)
