"""The page pool as a file that peers map, and its size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvist.errors import ConfigError, EngineError
from kvist.kv.layout import PageLayout
from kvist.memory import device_pool as device
from kvist.memory.device_pool import DevicePool, plan_pool_size
from kvist.memory.host_memory import available_host_bytes

LAYOUT = PageLayout(num_kv_heads=2, num_layers=3, page_size=4, head_dim=8, dtype="float32")
CPU = torch.device("cpu")
GIB = 1 << 30


def test_tensor_and_bytes_are_the_same_memory(tmp_path: Path) -> None:
    pool = DevicePool.create(LAYOUT, 5, device=CPU, directory=tmp_path)
    assert pool.tensor.shape == (5, 2, 3, 2, 4, 8)
    assert pool.bytes.shape == (5, LAYOUT.page_bytes)
    pool.tensor[3] = torch.arange(LAYOUT.num_page_elements).view(LAYOUT.shape)
    assert pool.bytes[3].tobytes() == pool.tensor[3].contiguous().numpy().tobytes()
    assert not pool.bytes[4].any()
    pool.close()


def test_a_peer_process_writes_into_our_pool(tmp_path: Path) -> None:
    pool = DevicePool.create(LAYOUT, 5, device=CPU, directory=tmp_path)
    address = pool.address
    assert (address.transport, address.num_pages, address.page_bytes) == ("shm", 5, LAYOUT.page_bytes)
    script = (
        "import sys\nwith open(sys.argv[1], 'r+b') as f:\n"
        f"    f.seek(2 * {LAYOUT.page_bytes})\n    f.write(b'\\x01' * {LAYOUT.page_bytes})\n"
    )
    subprocess.run([sys.executable, "-c", script, address.location], check=True)
    assert (pool.bytes[2] == 1).all()
    assert not pool.bytes[1].any()
    pool.close()


def test_attached_pools_share_memory_and_only_the_creator_removes_the_file(tmp_path: Path) -> None:
    pool = DevicePool.create(LAYOUT, 5, device=CPU, directory=tmp_path)
    other = DevicePool.attach(pool.address, LAYOUT)
    other.tensor[1] = 2.5
    assert bool((pool.tensor[1] == 2.5).all())
    other.close()
    assert Path(pool.address.location).exists()
    pool.close()
    assert list(tmp_path.iterdir()) == []


def test_a_pool_of_another_layout_is_not_attached(tmp_path: Path) -> None:
    pool = DevicePool.create(LAYOUT, 2, device=CPU, directory=tmp_path)
    other = PageLayout(num_kv_heads=2, num_layers=3, page_size=8, head_dim=4, dtype="float32")
    with pytest.raises(EngineError, match="it is kv_heads=2"):
        DevicePool.attach(pool.address, other)
    pool.close()


def test_the_pool_file_is_private_and_fully_allocated(tmp_path: Path) -> None:
    pool = DevicePool.create(LAYOUT, 500, device=CPU, directory=tmp_path)
    status = os.stat(pool.address.location)
    assert status.st_mode & 0o777 == 0o600
    assert status.st_size == 500 * LAYOUT.page_bytes
    assert status.st_blocks * 512 >= status.st_size
    pool.close()


def test_a_lack_of_space_is_an_error_before_any_file_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "free_bytes", lambda _: LAYOUT.page_bytes * 9)
    with pytest.raises(ConfigError, match=r"--runtime-dir.*lower --max-total-tokens"):
        DevicePool.create(LAYOUT, 10, device=CPU, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- size


def test_weights_and_pool_share_the_fraction_of_memory() -> None:
    size = plan_pool_size(LAYOUT, available_bytes=10 * GIB, weights_bytes=2 * GIB, mem_fraction_static=0.5)
    assert size.num_pages == (5 * GIB - 2 * GIB) // LAYOUT.page_bytes
    assert "0.5 of 10.00 GiB less 2.00 GiB of weights" in size.reason


def test_the_users_limit_beats_the_default_one_and_both_round_up() -> None:
    common: dict[str, Any] = {"available_bytes": GIB, "weights_bytes": 0, "mem_fraction_static": 0.9}
    capped = plan_pool_size(LAYOUT, **common, cap_tokens=99)
    chosen = plan_pool_size(LAYOUT, **common, cap_tokens=99, max_total_tokens=1001)
    assert (capped.num_pages, chosen.num_pages) == (25, 251)
    assert "default limit of 99 tokens" in capped.reason
    assert "--max-total-tokens 1001" in chosen.reason


def test_a_limit_that_does_not_fit_is_refused_not_clamped() -> None:
    with pytest.raises(ConfigError, match="--max-total-tokens 1000000"):
        plan_pool_size(
            LAYOUT, available_bytes=1 << 20, weights_bytes=0, mem_fraction_static=0.9, max_total_tokens=1_000_000
        )


@pytest.mark.parametrize("weights_bytes", [0, GIB, 9 * GIB])
def test_too_little_memory_is_an_error(weights_bytes: int) -> None:
    with pytest.raises(ConfigError, match="raise --mem-fraction-static"):
        plan_pool_size(
            LAYOUT,
            available_bytes=GIB,
            weights_bytes=weights_bytes,
            mem_fraction_static=0.5,
            min_tokens=GIB // LAYOUT.page_bytes * LAYOUT.page_size,
        )


def test_the_pool_must_fit_free_memory_but_is_sized_by_total_memory() -> None:
    """Workers that share a GPU get the same pools in whichever order they start, or an error."""
    common: dict[str, Any] = {"available_bytes": 10 * GIB, "weights_bytes": GIB, "mem_fraction_static": 0.5}
    first = plan_pool_size(LAYOUT, **common, free_bytes=10 * GIB)
    second = plan_pool_size(LAYOUT, **common, free_bytes=5 * GIB)
    assert first.num_pages == second.num_pages == 4 * GIB // LAYOUT.page_bytes
    with pytest.raises(ConfigError, match=r"other processes have left 4\.00 GiB.*lower --mem-fraction-static"):
        plan_pool_size(LAYOUT, **common, free_bytes=4 * GIB)
    small = plan_pool_size(LAYOUT, **common, free_bytes=2 * GIB, max_total_tokens=1000)
    assert small.num_pages == 250


def test_a_requested_pool_that_is_too_small_is_refused_with_its_flag() -> None:
    with pytest.raises(ConfigError, match="raise --max-total-tokens"):
        plan_pool_size(
            LAYOUT,
            available_bytes=GIB,
            weights_bytes=0,
            mem_fraction_static=0.5,
            max_total_tokens=1,
            min_tokens=2 * LAYOUT.page_size,
        )


def test_cached_files_count_as_available_below_the_limit_of_the_container(tmp_path: Path) -> None:
    mib = 1 << 20
    (tmp_path / "memory.max").write_text(f"{64 * mib}\n")
    (tmp_path / "memory.current").write_text(f"{60 * mib}\n")
    (tmp_path / "memory.stat").write_text(f"anon {20 * mib}\nactive_file {25 * mib}\ninactive_file {15 * mib}\n")
    assert available_host_bytes(tmp_path) == 44 * mib
    (tmp_path / "memory.max").write_text("max\n")
    assert available_host_bytes(tmp_path) > 64 * mib
