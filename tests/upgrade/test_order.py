"""The plan of an upgrade: its order, how each process is replaced, and orders that would break the service."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.cluster.config import ClusterConfig
from kvist.cluster.plan import ClusterShape, plan_cluster, plan_router
from kvist.cluster.pool_plan import PoolShape
from kvist.errors import ConfigError
from kvist.request import Role
from kvist.upgrade.order import How, Kind, Order, Part, Step, plan_upgrade
from kvist.upgrade.replacing import successor_plan
from kvist.upgrade.report import Row, longest_pause_s, table
from kvist.upgrade.verb import parts_of

WORKERS = (Part(name="prefill-0", kind=Kind.WORKER), Part(name="decode-0", kind=Kind.WORKER))
TIED = tuple(Part(name=part.name, kind=Kind.WORKER, has_gpu=True) for part in WORKERS)
KEPT = tuple(Part(name=part.name, kind=Kind.WORKER, folder=Path("/pages", part.name)) for part in WORKERS)
ROUTER = Part(name="router", kind=Kind.ROUTER)


def ways(parts: tuple[Part, ...], order: Order) -> list[tuple[str, How]]:
    return [(step.name, step.how) for step in plan_upgrade((*parts, ROUTER), order)]


def test_workers_without_gpu_and_folder_start_before_the_old_ones_stop_and_the_router_is_last() -> None:
    assert ways(WORKERS, Order.AUTO) == [
        ("prefill-0", How.START_FIRST),
        ("decode-0", How.START_FIRST),
        ("router", How.HAND_OVER),
    ]


@pytest.mark.parametrize("parts", [TIED, KEPT])
def test_workers_that_hold_something_stop_before_their_successors_start(parts: tuple[Part, ...]) -> None:
    assert [how for _, how in ways(parts, Order.AUTO)] == [How.STOP_FIRST, How.STOP_FIRST, How.HAND_OVER]


def test_an_order_is_followed_for_all_workers() -> None:
    assert [how for _, how in ways(TIED, Order.START_FIRST)][:2] == [How.START_FIRST] * 2
    assert [how for _, how in ways(WORKERS, Order.STOP_FIRST)][:2] == [How.STOP_FIRST] * 2


@pytest.mark.parametrize(
    ("part", "order", "remedy"),
    [
        (KEPT[0], Order.AUTO, "a second worker"),
        (TIED[0], Order.AUTO, "try --order start-first"),
        (WORKERS[0], Order.STOP_FIRST, "try --order start-first"),
        (KEPT[0], Order.START_FIRST, "--order stop-first"),
    ],
)
def test_the_only_worker_is_not_stopped_and_a_folder_is_not_shared(part: Part, order: Order, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        plan_upgrade([part, ROUTER], order)
    assert part.name in caught.value.message
    assert caught.value.param == "order"


def test_a_sole_worker_without_gpu_and_folder_is_replaced() -> None:
    assert ways(WORKERS[:1], Order.AUTO) == [("prefill-0", How.START_FIRST), ("router", How.HAND_OVER)]


@given(st.permutations([*WORKERS, ROUTER, Part(name="master", kind=Kind.MASTER), Part(name="s", kind=Kind.STORE)]))
def test_nodes_come_before_workers_and_workers_before_the_router(parts: list[Part]) -> None:
    kinds = [step.kind for step in plan_upgrade(parts, Order.AUTO)]
    assert kinds == [Kind.MASTER, Kind.STORE, Kind.WORKER, Kind.WORKER, Kind.ROUTER]


def test_stores_without_ssd_move_their_pages_first_if_another_store_can_take_them() -> None:
    def steps(num_stores: int, ssd: str | None) -> tuple[Step, ...]:
        shape = ClusterShape(
            config=ClusterConfig(), pool=PoolShape(num_stores=num_stores, ssd_path=ssd), persist_folder="/pages"
        )
        return plan_upgrade(parts_of(shape), Order.AUTO)

    assert [step.empties for step in steps(2, None)] == [False, True, True, False, False, False]
    assert not any(step.empties for step in steps(1, None)), "no other store could take its pages"
    assert not any(step.empties for step in steps(2, "/ssd")), "its pages are on its SSD"
    assert [step.how for step in steps(2, None)][:5] == [How.STOP_FIRST] * 5


def test_the_parts_of_a_cluster_have_its_gpus_and_the_folder_of_each_worker() -> None:
    shape = ClusterShape(config=ClusterConfig(prefill=1, decode=2), num_gpus=2, persist_folder="/pages")
    *workers, router = parts_of(shape)
    assert [(part.name, part.has_gpu, part.folder) for part in workers] == [
        (name, True, Path("/pages", name)) for name in ("prefill-0", "decode-0", "decode-1")
    ]
    assert router == ROUTER


# ---------------------------------------------------------------- plans of successors


def test_a_successor_has_the_new_python_its_own_port_and_the_present_role() -> None:
    shape = ClusterShape(config=ClusterConfig(), worker_argv=("--page-size=32",), persist_folder="/p", python="old")
    prefill, decode, _router = plan_cluster(shape, [1, 2])
    new = successor_plan(decode, "new", port=7, role=Role.UNIFIED)
    assert new.argv[0] == "new"
    assert set(decode.argv) - set(new.argv) == {"old", "--port=2", "--role=decode"}
    assert set(new.argv) - set(decode.argv) == {"new", "--port=7", "--role=unified"}
    assert (new.url, new.name, new.starts_after) == ("http://127.0.0.1:7", "decode-0", decode.starts_after)
    same = successor_plan(prefill, "new")
    assert same.argv[1:] == prefill.argv[1:]
    assert same.url == prefill.url


def test_a_router_behind_the_socket_of_its_parent_has_a_port_of_its_own_for_probes() -> None:
    shape = ClusterShape(config=ClusterConfig(), router_host="0.0.0.0", router_port=8000, front_fd=9)
    router = plan_cluster(shape, [1, 2], (), 77)[-1]
    assert router.url == "http://127.0.0.1:77"
    assert {"--host=127.0.0.1", "--port=77", "--listen-fd=9"} <= set(router.argv)
    assert router.listen_fd == 9
    assert shape.url == "http://127.0.0.1:8000"
    again = plan_router(shape, {Role.DECODE: ["http://127.0.0.1:5"]}, 78, ("decode-0",))
    assert "--prefill" not in again.argv
    assert again.argv[again.argv.index("--decode") + 1] == "http://127.0.0.1:5"
    assert again.stops_before == ("decode-0",)


def test_each_of_several_workers_keeps_its_own_folder() -> None:
    one = ClusterShape(config=ClusterConfig(prefill=0, decode=0, unified=1), persist_folder="/p")
    assert one.folder_of("unified-0") == Path("/p")
    two = ClusterShape(config=ClusterConfig(), persist_folder="/p")
    assert two.folder_of("decode-0") == Path("/p/decode-0")


# ---------------------------------------------------------------- the report


def test_the_longest_pause_is_the_longest_one_between_two_readings() -> None:
    before = {0.1: 5.0, 0.5: 7.0, float("inf"): 7.0}
    assert longest_pause_s(before, before) == 0
    assert longest_pause_s(before, {0.1: 9.0, 0.5: 11.0, float("inf"): 11.0}) == 0.1, "one over 0.1 s was before"
    assert longest_pause_s(before, {0.1: 9.0, 0.5: 12.0, float("inf"): 12.0}) == 0.5
    assert longest_pause_s({}, {0.1: 1.0, 0.5: 1.0, float("inf"): 2.0}) == float("inf")


def test_the_table_has_a_line_for_each_process_and_names_the_one_that_was_not_replaced() -> None:
    rows = [
        Row(process="decode-0", old_version="1.0", new_version="1.1", seconds=8.25, num_pages=40, longest_pause_s=0.5),
        Row(process="prefill-0", old_version="1.0", new_version="1.1", seconds=8, longest_pause_s=0),
        Row(process="router", old_version="1.0", seconds=3, problem="it does not start"),
    ]
    header, _, first, second, third = table(rows).splitlines()
    assert " ".join(header.split()) == "process old version new version seconds pages kept longest pause"
    assert first.split() == ["decode-0", "1.0", "1.1", "8.2", "40", "under", "0.5", "s"]
    assert second.split() == ["prefill-0", "1.0", "1.1", "8.0", "-", "no", "stream"]
    assert third.split()[:4] == ["router", "1.0", "not", "replaced"]
