"""Workers that cannot hand pages over to each other are never routed together."""

from __future__ import annotations

import pytest

from kvist.errors import Overloaded, Unavailable
from kvist.request import REQUEST_FIELDS, EpochId, Mode, Role
from kvist.router import pairs as module
from kvist.router.config import RouterConfig, RoutingOptions
from kvist.router.pairs import Pairs
from kvist.router.policy import Reason
from kvist.testing.router_bench import RouterBench
from kvist.testing.specs import make_pool, make_request, make_spec

IPC = make_pool(transport="cuda-ipc", device="cuda", from_devices=("cuda",))
NETWORK = make_pool(transport="network", same_host=False)
REQUEST = make_request(max_tokens=4)


def test_a_pair_is_compared_once_and_its_choice_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PAIRS", 2)
    pairs, source = Pairs(), make_spec(epoch=EpochId("p"))
    targets = [make_spec(epoch=EpochId(f"d{index}")) for index in range(3)]
    first = pairs.choice(source, targets[0])
    assert pairs.choice(source, targets[0]) is first
    for target in targets[1:]:
        pairs.choice(source, target)
    assert pairs.choice(source, targets[0]) is not first
    assert pairs.choice(source, targets[0]) == first


async def test_a_prefill_worker_is_paired_with_a_decode_worker_that_it_can_reach() -> None:
    bench = RouterBench()
    bench.engines.join("p", role=Role.PREFILL, host_id="one", transports=(make_pool(),))
    bench.engines.join("far", role=Role.DECODE, host_id="two", transports=(make_pool(),))
    near = bench.engines.join("near", role=Role.DECODE, host_id="one", transports=(make_pool(),))
    for _ in range(4):
        await bench.begin(REQUEST)
    assert [submit.mode for submit in bench.engines.submits(near)] == [Mode.DECODE] * 4


async def test_without_a_pair_that_can_hand_over_decode_serves_alone() -> None:
    bench = RouterBench()
    bench.engines.join("p", role=Role.PREFILL, host_id="one")
    decode = bench.engines.join("d", role=Role.DECODE, host_id="two")
    assert bench.dispatcher.ready()
    await bench.begin(REQUEST)
    assert [submit.mode for submit in bench.engines.submits(decode)] == [Mode.FULL]
    assert bench.dispatcher.snapshot().num_routes[Reason.NO_PREFILL] == 1


async def test_without_aggregation_the_error_of_an_incompatible_pair_names_both_values() -> None:
    bench = RouterBench(RouterConfig(routing=RoutingOptions(aggregate="never")))
    bench.engines.join("p", role=Role.PREFILL, transports=(make_pool(),))
    bench.engines.join("d", role=Role.DECODE, transports=(IPC,))
    assert not bench.dispatcher.ready()
    with pytest.raises(Unavailable) as caught:
        await (await bench.begin(REQUEST))
    for word in ("shm: worker d does not offer it", "cuda-ipc: worker p does not offer it", "--disaggregation"):
        assert word in caught.value.message


async def test_a_unified_worker_serves_when_no_pair_can_hand_over() -> None:
    bench = RouterBench()
    bench.engines.join("p", role=Role.PREFILL, host_id="one")
    bench.engines.join("d", role=Role.DECODE, host_id="two")
    unified = bench.engines.join("u", role=Role.UNIFIED)
    await bench.begin(REQUEST)
    assert [submit.mode for submit in bench.engines.submits(unified)] == [Mode.FULL]


async def test_a_full_worker_of_the_only_pair_is_an_overload() -> None:
    bench = RouterBench()
    bench.engines.join("p", role=Role.PREFILL, host_id="one", transports=(make_pool(),))
    bench.engines.join("far", role=Role.DECODE, host_id="two", transports=(NETWORK,))
    bench.engines.join(
        "near",
        role=Role.DECODE,
        host_id="one",
        transports=(make_pool(),),
        max_running_requests=1,
        max_queued_requests=0,
    )
    await bench.begin(REQUEST)
    await bench.begin(REQUEST)
    with pytest.raises(Overloaded):
        await (await bench.begin(REQUEST))


async def test_a_request_with_a_field_that_an_older_engine_would_ignore_is_not_sent_to_it() -> None:
    bench = RouterBench()
    known = tuple(name for name in REQUEST_FIELDS if name != "min_p")
    older = bench.engines.join("older", role=Role.UNIFIED, request_fields=known)
    newer_field = make_request(max_tokens=4, min_p=0.5)
    with pytest.raises(Unavailable, match="no ready worker knows min_p: run the gateway's version of Kvist"):
        await (await bench.begin(newer_field))
    await bench.begin(REQUEST)
    assert len(bench.engines.submits(older)) == 1
    newer = bench.engines.join("newer", role=Role.UNIFIED)
    for _ in range(3):
        await bench.begin(newer_field)
    assert (len(bench.engines.submits(older)), len(bench.engines.submits(newer))) == (1, 3)
