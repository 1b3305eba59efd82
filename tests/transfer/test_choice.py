"""The transport is chosen by its flag, or by the device of the pools."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvist.door import Backend, backend
from kvist.errors import ConfigError
from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.transfer import TRANSPORTS, TransportKind, make_transport
from kvist.transfer.shm import SHM

LAYOUT = PageLayout(num_kv_heads=2, num_layers=2, page_size=16, head_dim=8, dtype="float32")


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[DevicePool]:
    made = DevicePool.create(LAYOUT, 4, device=torch.device("cpu"), directory=tmp_path)
    yield made
    made.close()


def name_of(pool: DevicePool, runtime_dir: Path, name: str) -> str:
    transport = make_transport(pool, runtime_dir=runtime_dir, wakeup=lambda: None, name=name)
    transport.close()
    return transport.address.transport


def test_auto_is_the_first_transport_for_pools_on_the_device(
    pool: DevicePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[str, Backend[[], TransportKind]] = {
        "on gpus": backend(lambda: replace(SHM, device_type="cuda"), text="x"),
        "first": backend(lambda: SHM, text="x"),
        "second": backend(lambda: SHM, text="x"),
    }
    monkeypatch.setattr("kvist.transfer.TRANSPORTS", rows)
    assert name_of(pool, tmp_path, "auto") == "first"
    assert name_of(pool, tmp_path, "second") == "second"


def test_a_transport_for_other_pools_is_refused_with_a_remedy(pool: DevicePool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--disaggregation-transfer-backend cuda-ipc copies .*this pool is on cpu"):
        name_of(pool, tmp_path, "cuda-ipc")


def test_the_address_of_a_pools_file_names_a_transport_of_the_door(pool: DevicePool) -> None:
    assert pool.address.transport in TRANSPORTS
