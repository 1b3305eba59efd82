"""The requirements on every routing policy."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.page_index.page_runs import HeldPages
from kvist.request import Role, WorkerId
from kvist.router.policies import POLICIES
from kvist.router.policy import FleetView, Prompt, WorkerView
from kvist.router.rates import Rates

views = st.lists(
    st.builds(
        WorkerView,
        worker_id=st.text("abcdef", min_size=1, max_size=3).map(WorkerId),
        page_size=st.just(16),
        num_requests=st.integers(0, 100),
        num_pending_tokens=st.integers(0, 5_000),
        num_known_pages=st.integers(0, 100),
        held=st.builds(HeldPages, st.integers(0, 10), st.integers(0, 10)),
        num_coming_tokens=st.integers(0, 330),
        role=st.sampled_from(Role),
        page_bytes=st.just(4096),
        num_available_pages=st.integers(0, 100),
        max_running_requests=st.integers(1, 8),
        service_s=st.floats(0.0, 10.0),
        rates=st.builds(Rates, prompt_tokens_per_s=st.floats(1.0, 1e5)),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda view: view.worker_id,
)


def fleet_of(workers: list[WorkerView], *, with_pairs: bool) -> FleetView:
    by_role = {role: [worker for worker in workers if worker.role is role] for role in Role}
    prefill, decode = by_role[Role.PREFILL], by_role[Role.DECODE]
    pairs = with_pairs and bool(prefill) and bool(decode)
    return FleetView(
        alone=by_role[Role.UNIFIED],
        prefill=prefill if pairs else [],
        decode=decode if pairs else [],
        also_alone=[*prefill, *decode],
    )


@pytest.mark.parametrize("name", POLICIES)
@given(calls=st.lists(views, min_size=1, max_size=5), with_pairs=st.booleans())
def test_every_policy_chooses_a_path_and_the_same_one_again(
    name: str, calls: list[list[WorkerView]], with_pairs: bool
) -> None:
    prompt = Prompt(num_tokens=330)
    policy = POLICIES[name].make({})
    for workers in calls:
        again = copy.deepcopy(policy)
        fleet = fleet_of(workers, with_pairs=with_pairs)
        path = policy.choose(prompt, fleet)
        if path.is_alone:
            assert path.prefill in [*fleet.alone, *fleet.also_alone]
        else:
            assert path.prefill in fleet.prefill
            assert path.decode in fleet.decode
        other = again.choose(prompt, fleet_of(workers[::-1], with_pairs=with_pairs))
        assert (other.worker_ids, other.reason) == (path.worker_ids, path.reason)
