"""The flags of the storage tier. A flag that means the same as in SGLang has SGLang's name."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option
from kvist.door import Given, choice_of, options_of_choice
from kvist.errors import ConfigError
from kvist.kv.tiers.prefetch import PREFETCH_POLICIES, PrefetchConfig
from kvist.store import STORES

PREFIX = "hicache_storage_"  # of the flags of a store's own options


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageConfig:
    """The store behind the host tier (docs/cache.md). Raises `ConfigError` when settings contradict each other."""

    hicache_storage_backend: str | None = choice_of(
        STORES, None, "also keep the host tier's pages in a store", unset="none"
    )
    hicache_storage_options: Given = options_of_choice(
        STORES, chosen_by="hicache_storage_backend", title="store", prefix=PREFIX
    )
    hicache_storage_roots: tuple[str, ...] = option(
        (),
        "folders that PUT /hicache/storage-backend may name, together with the folders below them",
        unset="--hicache-storage-path",
    )
    hicache_storage_secret_file: str | None = option(
        None,
        "file with the secret that all workers of a store share: pages written with another secret are never used. "
        "Needed if other users may write to the store's disk",
        unset="a file in the store's folder",
    )
    hicache_storage_prefetch_policy: str = option(
        "timeout",
        "how long a request waits for its pages from the store: not at all (best_effort), until all pages are fetched "
        "(wait_complete), or until all pages are fetched or the timeout below has expired (timeout)",
        choices=PREFETCH_POLICIES,
    )
    hicache_storage_prefetch_threshold: int = option(
        256, "shorter prefixes are computed instead of fetched from the store", unit="tokens", minimum=1
    )
    hicache_storage_prefetch_timeout_base_s: float = option(
        1.0, "policy timeout: maximum wait for a prefix; a time for each 1000 tokens is added", unit="s", minimum=0
    )
    hicache_storage_prefetch_timeout_per_1k_s: float = option(
        0.25, "policy timeout: time added to the maximum wait for each 1000 tokens", unit="s", minimum=0
    )
    hicache_storage_deadline_s: float = option(
        10.0, "a store that takes longer than this for 128 pages is not used for a while", unit="s", minimum=0.1
    )
    hicache_storage_read_processes: int | None = option(
        None,
        "processes that read the store's pages into the host tier; with 0 threads of the engine do",
        unset="three quarters of the cores, at most 12; none on fewer than 4 cores",
        minimum=0,
    )

    def __post_init__(self) -> None:
        if self.hicache_storage_backend is None and self.hicache_storage_options:
            name = next(iter(self.hicache_storage_options))
            raise ConfigError(
                f"--hicache-storage-{name.replace('_', '-')} needs a store, and none is set: add "
                "--hicache-storage-backend",
                param="hicache_storage_backend",
            )

    def check_one_tier(self, pool: str | None) -> None:
        """Raise `ConfigError` for a store beside the page pool that `--storage` starts."""
        if pool is None:
            return
        if self.hicache_storage_backend not in (None, pool):
            raise ConfigError(
                f"--storage {pool} and --hicache-storage-backend {self.hicache_storage_backend} are two storage tiers: "
                "give one of them",
                param="storage",
            )
        if "mooncake_master_addr" in self.hicache_storage_options:
            raise ConfigError(
                "--storage mooncake starts a master, and --hicache-mooncake-master-addr names another: give one of "
                "them",
                param="storage",
            )

    def prefetch(self) -> PrefetchConfig:
        return PrefetchConfig(
            policy=self.hicache_storage_prefetch_policy,
            base_s=self.hicache_storage_prefetch_timeout_base_s,
            per_1k_s=self.hicache_storage_prefetch_timeout_per_1k_s,
            threshold_tokens=self.hicache_storage_prefetch_threshold,
        )
