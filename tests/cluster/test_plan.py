"""From numbers of workers to command lines."""

from __future__ import annotations

import pytest

from kvist.cluster.config import ClusterConfig
from kvist.cluster.plan import ClusterShape, free_ports, plan_cluster, share_threads
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
    with pytest.raises(ConfigError, match="no use without the other"):
        ClusterConfig(prefill=prefill, decode=decode)


def test_a_cluster_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="starts nothing"):
        ClusterConfig(prefill=0, decode=0)


@pytest.mark.parametrize(("workers", "cores", "each"), [(2, 2, 1), (2, 8, 4), (3, 8, 2), (5, 2, 1)])
def test_cores_are_dealt_out_evenly_and_nobody_goes_without(workers: int, cores: int, each: int) -> None:
    assert share_threads(workers, cores) == each


def test_free_ports_are_all_different() -> None:
    assert len(set(free_ports(20))) == 20
