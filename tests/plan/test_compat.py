"""Two engines hand pages over only if both mean the same by a page, by the best transport that both offer."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.plan.compat import TransportChoice, choose_transport, incompatibility, meet, peer_spec
from kvist.protocol import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION
from kvist.testing.specs import make_peer_spec, make_pool, make_spec
from kvist.wire import PeerSpec, PoolAddress, PoolPart

SHM = make_pool()
IPC = make_pool(transport="cuda-ipc", device="cuda", from_devices=("cuda",))
NETWORK = make_pool(transport="network", location="10.0.0.2:1", same_host=False)


def peer(name: str, *pools: PoolAddress, **changes: Any) -> PeerSpec:
    return make_peer_spec(*(pools or (SHM,)), worker_id=name, **changes)


def test_equal_engines_are_compatible() -> None:
    assert incompatibility(peer("p"), peer("d")) is None
    assert incompatibility(make_spec(worker_id="p"), peer_spec(make_spec(worker_id="d"))) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_fingerprint": "b" * 64}, ("model", "content " + "b" * 64, "content " + "f" * 64)),
        ({"dtype": "bfloat16"}, ("dtype", "bfloat16", "float32")),
        ({"page_size": 32}, ("page size", "32", "16")),
        ({"layout": "other"}, ("page layout", "other (64 bytes)", "l (64 bytes)")),
        ({"page_bytes": 128}, ("page layout", "l (128 bytes)", "l (64 bytes)")),
        (
            {"protocol_version": PROTOCOL_VERSION + 2},
            ("protocol version", f"{PROTOCOL_VERSION + 2}", f"{PROTOCOL_VERSION}"),
        ),
    ],
)
def test_a_difference_names_both_workers_and_both_values(change: dict[str, Any], named: tuple[str, str, str]) -> None:
    one = make_spec(worker_id="p1", model_fingerprint="f" * 64)
    other = make_spec(worker_id="d1", **{"model_fingerprint": "f" * 64, **change})
    found = incompatibility(one, other)
    assert found is not None
    name, theirs, ours = named
    assert found.startswith(f"worker d1 has another {name} than worker p1 ({theirs}, not {ours}): ")
    assert meet(one, other) == TransportChoice(name=None, reason=found, compatible=False)


def test_engines_of_different_tp_sizes_are_compatible() -> None:
    """A layout is that of whole pages, and each pool's address lists its own parts."""
    halves = tuple(PoolPart(location=f"/r{rank}", offset=32 * rank, num_bytes=32) for rank in range(2))
    one, two = peer("p", IPC), peer("d", msgspec.structs.replace(IPC, parts=halves))
    for source, target in ((one, two), (two, one), (two, two)):
        assert meet(source, target).name == "cuda-ipc"
    assert incompatibility(make_spec(tp_size=4), make_spec(tp_size=1)) is None
    other_heads = msgspec.structs.replace(IPC, layout="l with other heads", parts=halves)
    found = meet(one, peer("d", other_heads))
    assert found.name is None
    assert "l (64 bytes)" in found.reason
    assert "l with other heads (64 bytes)" in found.reason


def test_neighbouring_protocol_versions_are_compatible() -> None:
    versions = range(OLDEST_PROTOCOL_VERSION - 2, OLDEST_PROTOCOL_VERSION + 4)
    for one, other in itertools.product(versions, versions):
        found = incompatibility(peer("p", protocol_version=one), peer("d", protocol_version=other))
        assert (found is None) == (abs(one - other) <= 1 and min(one, other) >= OLDEST_PROTOCOL_VERSION)


def test_the_first_common_transport_of_the_source_is_chosen_with_its_reason() -> None:
    assert choose_transport(peer("p", IPC, NETWORK), peer("d", NETWORK, IPC)) == TransportChoice(
        name="cuda-ipc", reason="cuda-ipc: both pools are on GPUs of host h"
    )
    assert choose_transport(peer("p", SHM, NETWORK), peer("d", NETWORK, SHM)) == TransportChoice(
        name="shm", reason="shm: both pools are in the memory of host h"
    )
    assert choose_transport(peer("p", SHM, NETWORK), peer("d", NETWORK, SHM, host_id="i")) == TransportChoice(
        name="network", reason="network: from host h to host i"
    )
    staged = make_pool(transport="host-staged", device="cuda")
    assert choose_transport(peer("p", make_pool(transport="host-staged")), peer("d", staged)) == TransportChoice(
        name="host-staged", reason="host-staged: from the memory to a GPU of host h"
    )


def test_without_a_common_transport_the_reason_excludes_each_one() -> None:
    one_way = make_pool(transport="one-way", device="cuda", from_devices=("cuda",))
    choice = choose_transport(
        peer("p", SHM, make_pool(transport="one-way"), IPC),
        peer("d", SHM, one_way, NETWORK, host_id="i"),
    )
    assert choice.name is None
    assert "shm: works only within one host and one --runtime-dir, but worker p is on h, worker d on i" in choice.reason
    assert "one-way: works only within one host" in choice.reason
    assert "cuda-ipc: worker d does not offer it" in choice.reason
    assert "network: worker p does not offer it" in choice.reason
    choice = choose_transport(peer("p", make_pool(transport="one-way")), peer("d", one_way))
    assert "one-way: copies no pages from cpu (worker p) to cuda (worker d)" in choice.reason


def test_workers_without_transports_hand_nothing_over() -> None:
    alone = make_spec(transports=())
    assert choose_transport(alone, alone).name is None
    assert "both offer none" in choose_transport(alone, alone).reason


POOLS = st.lists(
    st.builds(
        lambda transport, device, from_devices, same_host: make_pool(
            transport=transport, device=device, from_devices=tuple(from_devices), same_host=same_host
        ),
        st.sampled_from("abcd"),
        st.sampled_from(("cpu", "cuda")),
        st.lists(st.sampled_from(("cpu", "cuda")), unique=True),
        st.booleans(),
    ),
    unique_by=lambda pool: pool.transport,
    max_size=4,
)


@given(POOLS, POOLS, st.booleans())
def test_a_choice_is_offered_by_both_and_reaches_the_target(
    ours: list[PoolAddress], theirs: list[PoolAddress], on_one_host: bool
) -> None:
    source = make_spec(worker_id="p", transports=tuple(ours))
    target = make_spec(worker_id="d", transports=tuple(theirs), host_id="h" if on_one_host else "i")
    usable = [
        from_.transport
        for from_ in ours
        for to in theirs
        if from_.transport == to.transport
        and (on_one_host or not to.same_host)
        and from_.device in to.from_devices
    ]  # fmt: skip
    choice = choose_transport(source, target)
    assert choice.name == (usable[0] if usable else None)
    for name in {pool.transport for pool in (*ours, *theirs)} if choice.name is None else {choice.name}:
        assert f"{name}: " in choice.reason
