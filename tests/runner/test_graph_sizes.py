"""The sizes of captured steps, and the memory reserved for them. No GPU needed."""

from __future__ import annotations

import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st

from kvist.attention.flashinfer import workspace_bytes
from kvist.models import ModelConfig
from kvist.runner.build import COLLECTIVES_BYTES, gpu_reserve_bytes
from kvist.runner.config import RunnerConfig, RunnerLimits
from kvist.runner.graph_sizes import MAX_MIXED_TOKENS, decode_sizes, graphs_bytes, mixed_sizes
from kvist.runner.shaping import table_sizes


@given(st.integers(1, 20_000))
def test_graph_sizes_rise_strictly_to_the_largest_replayed_step(limit: int) -> None:
    for sizes, largest in ((decode_sizes(limit), limit), (mixed_sizes(limit), min(limit, MAX_MIXED_TOKENS))):
        assert sizes == sorted(set(sizes))
        assert sizes[0] >= 1
        assert sizes[-1] == largest


def test_up_to_256_decodes_are_padded_to_at_most_the_next_multiple_of_8() -> None:
    assert decode_sizes(256) == [1, 2, 4, *range(8, 257, 8)]
    assert decode_sizes(1) == [1]
    assert decode_sizes(9) == [1, 2, 4, 8, 9]


@given(st.integers(129, 20_000))
def test_no_large_step_is_padded_by_more_than_a_quarter(limit: int) -> None:
    for sizes in (decode_sizes(limit), mixed_sizes(limit)):
        gaps = [(after - size - 1) / size for size, after in itertools.pairwise(sizes) if size >= 128]
        assert all(gap <= 0.25 for gap in gaps)


def test_thousands_of_requests_do_not_need_hundreds_of_graphs() -> None:
    assert len(decode_sizes(4096)) < 110
    assert graphs_bytes(4096, 8192, 1) < 3 << 30


def test_graph_memory_never_falls_with_more_requests_or_tokens() -> None:
    limits = [1, 8, 100, 256, 1000, 4096]
    for of_requests in (True, False):
        needs = [graphs_bytes(*((limit, 512) if of_requests else (256, limit)), vocab_size=1000) for limit in limits]
        assert needs == sorted(needs)


MIB = 1 << 20
QWEN2_7B = ModelConfig(
    family="qwen2",
    num_layers=28,
    hidden_size=3584,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=18944,
    vocab_size=152_064,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    max_position_embeddings=32_768,
    tie_word_embeddings=False,
    attention_bias=True,
    attention_output_bias=False,
    eos_token_ids=(0,),
)


def reserve(**changes: object) -> int:
    """On a GPU of 132 multiprocessors."""
    limits = RunnerLimits(max_running_requests=256, max_batch_tokens=2048)
    config = RunnerConfig(dtype="bfloat16", device="cuda", attention_backend="fa3", limits=limits)
    return gpu_reserve_bytes(QWEN2_7B, dataclasses.replace(config, **changes), 132)  # type: ignore[arg-type]


SLOTS = table_sizes(256, vocab_size=152_064, context_len=32_768).num_bytes
LOGITS = 256 * (152_064 * 4 + 64 * 1024)  # and what sampling makes of them


def test_memory_is_reserved_for_graphs_and_buffers_made_after_the_pool() -> None:
    num_decodes = len(decode_sizes(256))
    nodes_bytes = (num_decodes + len(mixed_sizes(2048))) * 16 * MIB + num_decodes * MIB
    assert reserve() == 256 * MIB + nodes_bytes + LOGITS + SLOTS
    assert reserve(tp=2) == reserve() + COLLECTIVES_BYTES


def test_no_memory_is_reserved_for_graphs_when_none_is_captured() -> None:
    assert reserve(uses_graphs=False) == reserve(attention_backend="torch") == SLOTS < 256 * 350 * 1024
    assert reserve(uses_graphs=False, attention_backend="torch", tp=2) == COLLECTIVES_BYTES + SLOTS


def test_flashinfer_reserves_workspaces_and_no_graphs_of_mixed_steps() -> None:
    eager = workspace_bytes(28, 4, 128, 132) + 8 * MIB + SLOTS
    assert reserve(attention_backend="flashinfer", uses_graphs=False) == eager
    num_decodes = len(decode_sizes(256))
    graphs = 256 * MIB + num_decodes * (16 + 1) * MIB + LOGITS
    planners = workspace_bytes(28, 4, 128, 132, 256) + num_decodes * MIB
    assert reserve(attention_backend="flashinfer") == eager + graphs + planners
    two_ranks = workspace_bytes(14, 2, 128, 132) + 8 * MIB + COLLECTIVES_BYTES + SLOTS
    assert reserve(attention_backend="flashinfer", uses_graphs=False, tp=2) == two_ranks
