"""The settings of the host tier and of the store behind it: what contradicts itself is refused, naming a remedy."""

from __future__ import annotations

import pytest

from kvist.errors import ConfigError
from kvist.worker.config import EngineConfig, HostTierConfig, StorageConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hicache_ratio": 3.0}, "add --enable-hierarchical-cache"),
        ({"hicache_size": 1.0}, "add --enable-hierarchical-cache"),
        ({"hicache_write_policy": "write_through_selective"}, "add --enable-hierarchical-cache"),
        ({"enable_hierarchical_cache": True, "hicache_ratio": 3.0, "hicache_size": 1.0}, "give one of them"),
    ],
)
def test_settings_that_mean_nothing_together_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        HostTierConfig(**settings)  # type: ignore[arg-type]


def test_tensor_parallel_ranks_have_no_host_tier() -> None:
    with pytest.raises(ConfigError, match="--tp 2 with --enable-hierarchical-cache"):
        EngineConfig(tp=2, host_tier=HostTierConfig(enable_hierarchical_cache=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hicache_storage_path": "/pages"}, "add --hicache-storage-backend file"),
        ({"hicache_storage_size": 1.0}, "add --hicache-storage-backend file"),
        ({"hicache_storage_backend": "memory", "hicache_storage_path": "/pages"}, "has no folder"),
    ],
)
def test_settings_of_a_store_that_mean_nothing_together_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StorageConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings", [{"hicache_storage_backend": "file"}, {"hicache_storage_prefetch_policy": "best_effort"}]
)
def test_a_store_needs_a_host_tier_in_front_of_it(settings: dict[str, object]) -> None:
    storage = StorageConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="add --enable-hierarchical-cache"):
        EngineConfig(storage=storage)
    EngineConfig(storage=storage, host_tier=HostTierConfig(enable_hierarchical_cache=True))


def test_the_prefetch_flags_reach_whoever_waits() -> None:
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
