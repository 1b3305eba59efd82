"""The host tier's settings: what contradicts itself is refused, with the flag to change."""

from __future__ import annotations

import pytest

from kvist.errors import ConfigError
from kvist.worker.config import EngineConfig, HostTierConfig


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
