"""The number of usable cores follows CPU sets and quotas, and the threads of the tiers follow that number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvist import cores
from kvist.cores import num_usable_cores, usable_cores


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
def test_a_cpu_quota_limits_the_number_of_usable_cores(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: frozenset(range(16)))
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert num_usable_cores(tmp_path / "cpu.max") == expected
    assert num_usable_cores(tmp_path / "none") == 16


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
