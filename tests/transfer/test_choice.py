"""Which transports an engine offers: all that work with its pool, or those that its flag names."""

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
from kvist.transfer import TRANSPORTS, TransportKind, make_transports
from kvist.transfer.shm import SHM

LAYOUT = PageLayout(num_kv_heads=2, num_layers=2, page_size=16, head_dim=8, dtype="float32")


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[DevicePool]:
    made = DevicePool.create(LAYOUT, 4, device=torch.device("cpu"), directory=tmp_path)
    yield made
    made.close()


def offered(pool: DevicePool, runtime_dir: Path, names: str) -> list[str]:
    transports = make_transports(pool, runtime_dir=runtime_dir, wakeup=lambda: None, names=names)
    transports.close()
    return [address.transport for address in transports.addresses]


ON_GPUS = frozenset({("cuda", "cuda")})


def test_auto_offers_all_transports_for_pools_on_the_device(
    pool: DevicePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[str, Backend[[], TransportKind]] = {
        "on gpus": backend(lambda: replace(SHM, device_pairs=ON_GPUS), text="x"),
        "first": backend(lambda: SHM, text="x"),
        "broken": backend(lambda: replace(SHM, obstacle=lambda _: "is not installed"), text="x"),
        "second": backend(lambda: SHM, text="x"),
    }
    monkeypatch.setattr("kvist.transfer.TRANSPORTS", rows)
    assert offered(pool, tmp_path, "auto") == ["first", "second"]
    assert offered(pool, tmp_path, "second") == ["second"]
    assert offered(pool, tmp_path, "second,first") == ["second", "first"]
    with pytest.raises(ConfigError, match=r"backend broken: is not installed\. Use auto"):
        offered(pool, tmp_path, "first,broken")


def test_a_transport_for_other_pools_is_refused_with_a_remedy(pool: DevicePool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--disaggregation-transfer-backend cuda-ipc: copies .*this pool is on cpu"):
        offered(pool, tmp_path, "cuda-ipc")


def test_the_address_of_a_pools_file_names_a_transport_of_the_door(pool: DevicePool) -> None:
    assert pool.address.transport in TRANSPORTS
