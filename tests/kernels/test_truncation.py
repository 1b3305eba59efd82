"""The floors of truncated rows: found among the likeliest tokens only where the other tokens cannot change them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kvist.kernels.operands import SamplingColumns
from kvist.kernels.truncation import floors_of_likeliest, truncation_floors_torch

NEG_INF = float("-inf")
LOGITS = st.lists(st.sampled_from([0.0, -0.5, -1.0, -2.0, -2.5, -6.0, NEG_INF]), min_size=30, max_size=30)


def columns_of(top_k: int, top_p: float, reach: float, temperature: float = 1.0) -> SamplingColumns:
    return SamplingColumns(
        temperatures=torch.tensor([temperature]),
        keys=torch.zeros(1, 2, dtype=torch.int32),
        top_k=torch.tensor([top_k], dtype=torch.int32),
        top_p=torch.tensor([top_p]),
        reach=torch.tensor([reach]),
    )


@example([-1.0] * 30, 3, 0.3, NEG_INF, 1.0, 5)  # more tokens are as likely as the third than the list has
@example([-1.0 - 0.001 * place for place in range(30)], 20, 0.3, NEG_INF, 1.0, 5)  # the 20th is not in the list
@given(
    LOGITS,
    st.sampled_from([0, 1, 3, 9, 12, 20, 1000]),
    st.sampled_from([1.0, 0.95, 0.7, 0.4, 0.1, 0.01]),
    st.sampled_from([NEG_INF, -1.5, -0.1]),
    st.sampled_from([0.3, 1.0, 3.0]),
    st.integers(1, 30),
)
def test_a_floor_found_among_the_likeliest_tokens_is_that_of_all_tokens(
    logits: list[float], top_k: int, top_p: float, reach: float, temperature: float, num_likeliest: int
) -> None:
    shifted = torch.tensor([[0.0, *logits]])
    columns = columns_of(top_k, top_p, reach, temperature)
    floors, found = floors_of_likeliest(shifted.topk(num_likeliest, dim=-1).values, shifted, columns)
    if found.item():
        assert torch.equal(floors, truncation_floors_torch(shifted, columns))


@pytest.mark.parametrize(("top_k", "top_p", "floor"), [(4, 1.0, -1.0), (3, 1.0, -1.0), (4, 0.5, -1.0), (4, 0.2, 0.0)])
def test_tokens_as_likely_as_the_least_likely_kept_one_are_kept(top_k: int, top_p: float, floor: float) -> None:
    shifted = torch.tensor([[-1.0, 0.0, -1.0, -3.0, -1.0, -1.0]])
    assert truncation_floors_torch(shifted, columns_of(top_k, top_p, NEG_INF)).item() == floor
