"""Engines and gateways are bound to separate cores if there are enough, and otherwise not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist import cores
from kvist.cores import Place, num_usable_cores, read_places, separate, split, usable_cores


def machine(num_packages: int, cores_each: int, threads: int) -> dict[int, Place]:
    """Return the places of CPUs numbered as on Linux: the second threads of all cores after the first ones."""
    num_cores = num_packages * cores_each
    return {
        thread * num_cores + core: (core // cores_each, core) for thread in range(threads) for core in range(num_cores)
    }


@given(st.integers(1, 4), st.integers(2, 32), st.integers(1, 2), st.data())
def test_both_threads_of_a_core_are_on_one_side_and_each_package_on_both(
    num_packages: int, cores_each: int, threads: int, data: st.DataObject
) -> None:
    places = machine(num_packages, cores_each, threads)
    engine, gateway = split(places)
    assert engine | gateway == set(places)
    assert not engine & gateway
    assert not {places[core] for core in engine} & {places[core] for core in gateway}
    for side in (engine, gateway):
        assert {places[core][0] for core in side} == set(range(num_packages))
    assert abs(len(engine) - len(gateway)) <= num_packages * threads
    fewer = data.draw(st.sets(st.sampled_from(sorted(places))))  # the cores of a container
    engine, gateway = split({core: places[core] for core in fewer})
    assert engine | gateway == fewer
    assert not engine & gateway


def test_two_workers_of_one_host_compute_the_same_split() -> None:
    places = machine(2, 8, 2)
    assert split(places) == split(dict(reversed(places.items())))


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[Collection[int]]:
    """Record the bindings on a simulated machine of 8 cores with two threads each."""
    places = machine(1, 8, 2)
    monkeypatch.setattr(cores, "usable_cores", lambda: frozenset(places))
    monkeypatch.setattr(cores, "read_places", lambda asked: {core: places[core] for core in asked})
    calls: list[Collection[int]] = []
    monkeypatch.setattr(cores, "bind_process", lambda chosen: calls.append(chosen) or True)
    return calls


def test_the_engine_binds_to_its_half_and_returns_the_gateways_cores(bound: list[Collection[int]]) -> None:
    assert separate(2) == {1, 3, 5, 7, 9, 11, 13, 15}
    assert bound == [{0, 2, 4, 6, 8, 10, 12, 14}]


def test_too_many_engines_for_the_cores_are_not_bound(bound: list[Collection[int]]) -> None:
    assert separate(3) == frozenset()
    assert bound == []


@pytest.mark.parametrize("num_usable", [1, 7])
def test_a_process_with_few_cores_is_not_bound(
    num_usable: int, bound: list[Collection[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: frozenset(range(num_usable)))
    assert separate(1) == frozenset()
    assert bound == []


def test_without_a_core_topology_nothing_is_bound(
    bound: list[Collection[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "read_places", lambda _asked: {})
    assert separate(1) == frozenset()
    assert bound == []


def test_a_refused_binding_leaves_the_gateway_unbound(
    bound: list[Collection[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "bind_process", lambda _cores: False)
    assert separate(1) == frozenset()
    assert bound == []


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("400000 100000", 4),
        ("150000 100000", 2),
        ("1000 100000", 1),
        ("9900000 100000", 16),
        ("max 100000", 16),
        ("", 16),
    ],
)
@pytest.mark.usefixtures("bound")
def test_a_cpu_quota_limits_the_number_of_usable_cores(quota: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert num_usable_cores(tmp_path / "cpu.max") == expected
    assert num_usable_cores(tmp_path / "none") == 16


def test_core_places_are_read_from_sysfs(tmp_path: Path) -> None:
    for core, siblings in enumerate(("0-1", "0-1", "2,6", "nonsense")):
        topology = tmp_path / f"cpu{core}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings + "\n")
        (topology / "physical_package_id").write_text("1\n")
    assert read_places([0, 1, 2], tmp_path) == {0: (1, 0), 1: (1, 0), 2: (1, 2)}
    assert read_places([2, 3], tmp_path) == {}
    assert read_places([2, 4], tmp_path) == {}


@pytest.mark.skipif(len(usable_cores()) < 2, reason="needs two cores")
def test_binding_applies_to_running_and_new_threads() -> None:
    code = """
import os, threading
from kvist.cores import bind_process, usable_cores
seen, go = [], threading.Event()
def look():
    go.wait(10)
    seen.append(os.sched_getaffinity(0))
old = threading.Thread(target=look); old.start()
one = {min(usable_cores())}
assert bind_process(one)
go.set(); old.join()
new = threading.Thread(target=look); new.start(); new.join()
assert seen == [one, one] and usable_cores() == one, seen
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30, env=environ)


@pytest.mark.skipif(len(usable_cores()) < 2, reason="needs two cores")
def test_the_tiers_start_as_many_threads_as_cores_are_usable_now(tmp_path: Path) -> None:
    """The number of cores of the host at import would be too high in a container with few cores."""
    code = f"""
import os
os.cpu_count = lambda: 64
import torch
from pathlib import Path
from kvist.memory import host_pool, persistence
from kvist.store import io_threads
sizes = []
class Threads(host_pool.ThreadPoolExecutor):
    def __init__(self, num_threads):
        sizes.append(num_threads)
        super().__init__(num_threads)
host_pool.ThreadPoolExecutor = persistence.ThreadPoolExecutor = Threads
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
host_pool._make_resident(torch.empty(1 << 20, dtype=torch.uint8))
persistence.PersistentPages(Path({str(tmp_path)!r}), namespace="n", num_pages=2, page_bytes=64).restore()
assert (sizes, io_threads.num_readers()) == ([1, 1], 4), sizes
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environ)
