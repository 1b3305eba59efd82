"""The requirements on every routing policy."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.request import WorkerId
from kvist.router.policies import POLICIES
from kvist.router.policy import Prompt, WorkerView
from kvist.router.prefix_index import HeldPages

views = st.lists(
    st.builds(
        WorkerView,
        worker_id=st.text("abcdef", min_size=1, max_size=3).map(WorkerId),
        page_size=st.just(16),
        num_requests=st.integers(0, 100),
        num_pending_tokens=st.integers(0, 5_000),
        num_known_pages=st.integers(0, 100),
        held=st.builds(HeldPages, st.integers(0, 10), st.integers(0, 10)),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda view: view.worker_id,
)


@pytest.mark.parametrize("name", POLICIES)
@given(calls=st.lists(views, min_size=1, max_size=5), hit_weight=st.sampled_from([0.25, 1.0]))
def test_every_policy_chooses_a_candidate_and_the_same_one_again(
    name: str, calls: list[list[WorkerView]], hit_weight: float
) -> None:
    prompt = Prompt(num_tokens=330, hit_weight=hit_weight)
    policy = POLICIES[name].make({})
    for candidates in calls:
        again = copy.deepcopy(policy)
        chosen = policy.choose(prompt, candidates)
        assert chosen in {candidate.worker_id for candidate in candidates}
        assert again.choose(prompt, candidates[::-1]) == chosen
