"""A role is a set of admitted modes."""

from __future__ import annotations

import pytest

from kvist.kv.cache import PageCache
from kvist.request import HandoffId, Mode, Outcome, Role, WorkerId
from kvist.scheduler import build_scheduler
from kvist.simulation.cluster import sim_request
from kvist.simulation.engine import small_config
from kvist.testing.specs import make_peer_spec
from kvist.wire import Done, PrefillPeer, Submit
from tests.scheduler.handoff_bench import FIRST, PROMPT, D, P, messages, pool


@pytest.mark.parametrize(
    ("role", "modes"),
    [
        (Role.UNIFIED, {Mode.FULL, Mode.PREFILL}),
        (Role.PREFILL, {Mode.FULL, Mode.PREFILL}),
        (Role.DECODE, {Mode.FULL, Mode.DECODE}),
    ],
)
def test_a_role_admits_exactly_its_modes(role: Role, modes: set[Mode]) -> None:
    assert role.modes == modes


@pytest.mark.parametrize("role", list(Role))
def test_a_refused_request_leaves_no_handoff_and_a_later_message_for_it_is_harmless(role: Role) -> None:
    cache = PageCache(num_pages=12, page_size=4, namespace="t")
    scheduler = build_scheduler(role, small_config(), cache, D, make_peer_spec(pool(D)))
    wrong = Mode.PREFILL if role is Role.DECODE else Mode.DECODE
    submit = Submit(
        request=sim_request("r", PROMPT),
        mode=wrong,
        handoff_id=HandoffId("h"),
        prefill=PrefillPeer(worker_id=WorkerId("p"), endpoint="p", epoch=P) if wrong is Mode.DECODE else None,
        target_epoch=D if wrong is Mode.PREFILL else None,
    )
    plan = scheduler.step(0.0, [submit])
    assert [ended.outcome for ended in plan.ended] == [Outcome.FAILED]
    done = Done(handoff_id=HandoffId("h"), target_epoch=D, source_epoch=P, num_pages=0, checksum="", first_token=FIRST)
    assert messages(scheduler.step(0.1, [done])) == []
    assert not scheduler.has_work()
