"""Which sizes of steps are recorded, and the memory set aside for them. No GPU needed."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.runner.build import COLLECTIVES_BYTES, RunnerConfig, gpu_reserve_bytes
from kvist.runner.graph_sizes import MAX_MIXED_TOKENS, decode_sizes, graphs_bytes, mixed_sizes


@given(st.integers(1, 20_000))
def test_sizes_rise_without_repetition_to_the_largest_step_that_is_replayed(limit: int) -> None:
    for sizes, largest in ((decode_sizes(limit), limit), (mixed_sizes(limit), min(limit, MAX_MIXED_TOKENS))):
        assert sizes == sorted(set(sizes))
        assert sizes[0] >= 1
        assert sizes[-1] == largest


def test_decodes_are_padded_to_the_next_multiple_of_8_at_most_up_to_256_of_them() -> None:
    assert decode_sizes(256) == [1, 2, 4, *range(8, 257, 8)]
    assert decode_sizes(1) == [1]
    assert decode_sizes(9) == [1, 2, 4, 8, 9]


@given(st.integers(129, 20_000))
def test_no_large_step_is_padded_by_more_than_a_quarter(limit: int) -> None:
    for sizes in (decode_sizes(limit), mixed_sizes(limit)):
        gaps = [(after - size - 1) / size for size, after in itertools.pairwise(sizes) if size >= 128]
        assert all(gap <= 0.25 for gap in gaps)


def test_thousands_of_requests_do_not_want_hundreds_of_recordings() -> None:
    assert len(decode_sizes(4096)) < 110
    assert graphs_bytes(4096, 8192) < 3 << 30


def test_more_requests_or_tokens_never_want_less_memory() -> None:
    limits = [1, 8, 100, 256, 1000, 4096]
    for of_requests in (True, False):
        needs = [graphs_bytes(*((limit, 512) if of_requests else (256, limit))) for limit in limits]
        assert needs == sorted(needs)


def test_memory_is_set_aside_for_what_will_be_made_after_the_pool() -> None:
    config = RunnerConfig(device="cuda", attention_backend="fa3", max_running_requests=256, max_batch_tokens=2048)
    assert gpu_reserve_bytes(config) == graphs_bytes(256, 2048)
    assert gpu_reserve_bytes(dataclasses.replace(config, tp=2)) == graphs_bytes(256, 2048) + COLLECTIVES_BYTES


@pytest.mark.parametrize("without", [{"use_graphs": False}, {"attention_backend": "torch"}])
def test_nothing_is_set_aside_for_graphs_where_none_is_recorded(without: dict[str, object]) -> None:
    config = dataclasses.replace(RunnerConfig(device="cuda", attention_backend="fa3"), **without)  # type: ignore[arg-type]
    assert gpu_reserve_bytes(config) == 0
