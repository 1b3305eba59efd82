"""The settings of the host tier and the store: contradictions are refused with a remedy."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import torch

from kvist.engine.assembly import make_host_pool
from kvist.engine.config import EngineOptions, HostTierConfig
from kvist.errors import ConfigError
from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.store.config import StorageConfig
from kvist.store.file_options import FileStoreOptions

LAYOUT = PageLayout(num_kv_heads=1, num_layers=1, page_size=4, head_dim=8, dtype="float32")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hicache_ratio": 3.0}, "add --enable-hierarchical-cache"),
        ({"hicache_size": 1.0}, "add --enable-hierarchical-cache"),
        ({"hicache_write_policy": "write_through_selective"}, "add --enable-hierarchical-cache"),
        ({"enable_hierarchical_cache": True, "hicache_ratio": 3.0, "hicache_size": 1.0}, "give one of them"),
    ],
)
def test_contradicting_host_tier_settings_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        HostTierConfig(**settings)  # type: ignore[arg-type]


def test_a_host_pool_over_the_available_memory_is_refused_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = DevicePool.create(LAYOUT, 8, device=torch.device("cpu"), directory=tmp_path / "run")
    config = HostTierConfig(enable_hierarchical_cache=True, hicache_persist=str(tmp_path / "kept"))  # 16 pages
    available_bytes = 16 * LAYOUT.page_bytes
    monkeypatch.setattr("kvist.engine.assembly.available_host_bytes", lambda: available_bytes)
    with contextlib.ExitStack() as closing:
        available_bytes -= 1
        with pytest.raises(ConfigError, match="lower --hicache-ratio") as caught:
            make_host_pool(config, pool, "n", closing)
        assert caught.value.param == "hicache_ratio"
        assert not (tmp_path / "kept").exists()
        available_bytes += 1
        host_pool = make_host_pool(config, pool, "n", closing)
        assert host_pool is not None
        assert host_pool.tensor.shape[0] == 16
    pool.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": ""}, "is empty"),
        ({"path": "a\0b"}, "not the path of a folder"),
        ({"size": 0.0}, "not possible"),
        ({"size": math.inf}, "not possible"),
    ],
)
def test_impossible_options_of_a_file_store_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FileStoreOptions(**settings)  # type: ignore[arg-type]


def test_options_without_a_store_are_refused() -> None:
    with pytest.raises(ConfigError, match="--hicache-storage-path needs a store"):
        StorageConfig(hicache_storage_options={"path": "/pages"})


@pytest.mark.parametrize(
    "settings", [{"hicache_storage_backend": "file"}, {"hicache_storage_prefetch_policy": "best_effort"}]
)
def test_store_settings_without_a_host_tier_are_refused(settings: dict[str, object]) -> None:
    storage = StorageConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="add --enable-hierarchical-cache"):
        EngineOptions(storage=storage)
    EngineOptions(storage=storage, host_tier=HostTierConfig(enable_hierarchical_cache=True))


def test_the_prefetch_flags_become_the_prefetch_config() -> None:
    prefetch = StorageConfig(
        hicache_storage_prefetch_policy="wait_complete",
        hicache_storage_prefetch_threshold=32,
        hicache_storage_prefetch_timeout_base_s=2.0,
        hicache_storage_prefetch_timeout_per_1k_s=3.0,
    ).prefetch()
    assert (prefetch.policy, prefetch.threshold_tokens, prefetch.base_s, prefetch.per_1k_s) == (
        "wait_complete",
        32,
        2.0,
        3.0,
    )
