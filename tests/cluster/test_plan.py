"""The plan turns numbers of workers into command lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvist.cluster.config import ClusterConfig
from kvist.cluster.plan import ClusterShape, plan_cluster, threads_for_each, visible_gpus
from kvist.cluster.pool_plan import PoolShape
from kvist.errors import ConfigError


def test_every_worker_gets_its_role_port_and_threads_and_the_router_gets_their_urls() -> None:
    shape = ClusterShape(
        config=ClusterConfig(prefill=2, decode=1), threads_per_worker=3, worker_argv=("--page-size=32",), python="py"
    )
    plans = plan_cluster(shape, [1, 2, 3])
    assert [plan.name for plan in plans] == ["prefill-0", "prefill-1", "decode-0", "router"]
    second = plans[1].argv
    assert second[:4] == ("py", "-m", "kvist", "serve")
    assert {"--role=prefill", "--port=2", "--num-threads=3", "--page-size=32", "--stop-with-stdin"} <= set(second)
    router = plans[-1].argv
    start = router.index("--prefill")
    assert router[start : start + 5] == (
        *("--prefill", "http://127.0.0.1:1", "http://127.0.0.1:2"),
        *("--decode", "http://127.0.0.1:3"),
    )
    assert "--page-size=32" not in router


def test_unified_workers_reach_the_router_as_worker_urls() -> None:
    plans = plan_cluster(ClusterShape(config=ClusterConfig(prefill=0, decode=0, unified=1)), [9])
    assert plans[-1].argv[plans[-1].argv.index("--worker-urls") + 1] == "http://127.0.0.1:9"
    assert "--prefill" not in plans[-1].argv


def test_a_router_on_all_interfaces_is_probed_through_loopback() -> None:
    shape = ClusterShape(config=ClusterConfig(), router_host="0.0.0.0", router_port=8000)
    assert plan_cluster(shape, [1, 2])[-1].url == "http://127.0.0.1:8000"


@pytest.mark.parametrize(("prefill", "decode"), [(1, 0), (0, 2)])
def test_prefill_without_decode_is_refused(prefill: int, decode: int) -> None:
    with pytest.raises(ConfigError, match="need each other"):
        ClusterConfig(prefill=prefill, decode=decode)


def test_a_cluster_without_workers_is_refused() -> None:
    with pytest.raises(ConfigError, match="starts no worker"):
        ClusterConfig(prefill=0, decode=0)


@pytest.mark.parametrize(("workers", "cores", "each"), [(2, 2, 1), (2, 8, 4), (3, 8, 2), (5, 2, 1)])
def test_cores_are_shared_evenly_and_every_worker_gets_one(workers: int, cores: int, each: int) -> None:
    assert threads_for_each(workers, cores) == each


def options_of(shape: ClusterShape) -> list[tuple[str | None, str | None]]:
    """Return (--base-gpu-id, --mem-fraction-static) of each worker."""
    dealt = []
    for plan in plan_cluster(shape, range(shape.config.num_workers))[:-1]:
        given = dict(argument.split("=") for argument in plan.argv if "=" in argument)
        dealt.append((given.get("--base-gpu-id"), given.get("--mem-fraction-static")))
    return dealt


def test_gpus_are_assigned_round_robin_and_workers_on_one_gpu_share_its_memory() -> None:
    three = ClusterConfig(prefill=2, decode=1)
    assert options_of(ClusterShape(config=three, num_gpus=2, memory_share=0.8)) == [
        ("0", "0.4000"),
        ("1", None),
        ("0", "0.4000"),
    ]
    assert options_of(ClusterShape(config=three, num_gpus=4, base_gpu_id=1, memory_share=0.8)) == [
        ("1", None),
        ("2", None),
        ("3", None),
    ]


def test_a_memory_fraction_set_by_the_user_reaches_every_worker_unchanged() -> None:
    shape = ClusterShape(config=ClusterConfig(), num_gpus=1, worker_argv=("--mem-fraction-static=0.3",))
    assert options_of(shape) == [("0", "0.3"), ("0", "0.3")]


def test_a_tensor_parallel_worker_gets_its_gpus_in_a_row() -> None:
    shape = ClusterShape(config=ClusterConfig(), num_gpus=4, gpus_per_worker=2, memory_share=0.8)
    assert options_of(shape) == [("0", None), ("2", None)]


def test_without_gpus_no_gpu_options_are_assigned() -> None:
    shape = ClusterShape(config=ClusterConfig(), num_gpus=0, gpus_per_worker=2, memory_share=0.8)
    assert options_of(shape) == [(None, None), (None, None)]


@pytest.mark.parametrize(("first", "size"), [(0, 2), (1, 1), (7, 1)])
def test_missing_gpus_are_assigned_so_that_the_worker_refuses_with_a_reason(first: int, size: int) -> None:
    shape = ClusterShape(config=ClusterConfig(), num_gpus=1, base_gpu_id=first, gpus_per_worker=size)
    assert options_of(shape) == [(str(first), None), (str(first), None)]


@pytest.mark.parametrize(
    ("chosen", "count"), [(None, 2), ("", 0), ("-1", 0), ("1", 1), ("GPU-a, GPU-b,GPU-c", 3), ("0,-1,1", 1)]
)
def test_gpus_are_counted_as_a_worker_would_see_them(tmp_path: Path, chosen: str | None, count: int) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    environ = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    assert visible_gpus(environ, tmp_path) == count


def test_a_page_pool_is_planned_before_its_workers_and_stops_after_them(tmp_path: Path) -> None:
    pool = PoolShape(num_stores=2, store_argv=("--segment-size=2",), ssd_path=str(tmp_path), ssd_size=3.0, stop_s=60.0)
    shape = ClusterShape(config=ClusterConfig(), pool=pool)
    pool.make_folders()
    master, *stores, prefill, decode, router = plan_cluster(shape, [1, 2], [11, 12, 13, 14])
    assert [master.name, *(store.name for store in stores)] == list(pool.names) == ["master", "store-0", "store-1"]
    assert "--rpc-port=12" in master.argv
    for store, port in zip(stores, (13, 14), strict=True):
        assert (store.starts_after, store.stops_before, store.stop_s) == (("master",), ("master",), 60.0)
        assert {"--segment-size=2", "--hicache-mooncake-master-addr=127.0.0.1:12", "--ssd-size=3.0"} <= {*store.argv}
        assert f"--port={port}" in store.argv
        assert f"--ssd-path={tmp_path / store.name}" in store.argv
        assert (tmp_path / store.name).is_dir()
    for worker in (prefill, decode):
        assert worker.starts_after == worker.stops_before == pool.names
        assert "--hicache-mooncake-master-addr=127.0.0.1:12" in worker.argv
    assert router.stops_before == ("prefill-0", "decode-0")
    with pytest.raises(ConfigError, match="mkdir -p"):
        PoolShape(num_stores=1, ssd_path=str(tmp_path / "none")).make_folders()
