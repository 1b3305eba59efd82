"""The settings of one engine process. The flags keep SGLang's names where they mean the same."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvist.channel import ChannelConfig
from kvist.config import option
from kvist.errors import ConfigError
from kvist.kv.storage_tier import PREFETCH_POLICIES, PrefetchConfig
from kvist.log import LogConfig
from kvist.runner.config import RunnerOptions
from kvist.scheduler.config import SchedulerOptions

DEFAULT_RATIO, DEFAULT_POLICY = 2.0, "write_through"
DEFAULT_STORAGE_GB = 64.0
STORAGE_BACKENDS = ("file", "memory")
UNIFIED, PREFILL, DECODE = "unified", "prefill", "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTierConfig:
    """The cache's second tier (docs/cache.md). Raises `ConfigError` when settings contradict each other."""

    enable_hierarchical_cache: bool = option(
        False, "keep pages in host memory, too, and take them back from there instead of computing them again"
    )
    hicache_ratio: float = option(
        DEFAULT_RATIO, "pages of the host tier, as a multiple of the device pool's", minimum=0.01
    )
    hicache_size: float | None = option(
        None, "size of the host tier, instead of --hicache-ratio", unit="GB", minimum=0.001, unset="by the ratio"
    )
    hicache_write_policy: str = option(
        DEFAULT_POLICY,
        "when a page is copied to the host tier: as soon as it is computed (write_through), after its second hit "
        "(write_through_selective), or when the device pool will soon need its room (write_back)",
        choices=("write_through", "write_through_selective", "write_back"),
    )
    hicache_persist: str | None = option(
        None,
        "folder, for this worker alone, in which the host tier's pages survive a restart; with a GPU it should be in "
        "shared memory (/dev/shm)",
    )

    def __post_init__(self) -> None:
        sized = self.hicache_ratio != DEFAULT_RATIO
        if not self.enable_hierarchical_cache and (
            sized
            or self.hicache_size is not None
            or self.hicache_write_policy != DEFAULT_POLICY
            or self.hicache_persist is not None
        ):
            raise ConfigError(
                "the --hicache options describe the host tier, which is off: add --enable-hierarchical-cache",
                param="enable_hierarchical_cache",
            )
        if sized and self.hicache_size is not None:
            raise ConfigError(
                f"--hicache-ratio {self.hicache_ratio:g} and --hicache-size {self.hicache_size:g} both set the size of "
                "the host tier: give one of them",
                param="hicache_size",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageConfig:
    """The store behind the host tier (docs/cache.md). Raises `ConfigError` when settings contradict each other."""

    hicache_storage_backend: str | None = option(
        None,
        "also keep the host tier's pages in a store: file is a folder that workers share and that outlives them; "
        "memory, for tests, belongs to this worker alone",
        choices=STORAGE_BACKENDS,
        unset="none",
    )
    hicache_storage_path: str | None = option(
        None, "folder of the file store; it is made if missing", unset="kvist/pages in the user's cache folder"
    )
    hicache_storage_roots: tuple[str, ...] = option(
        (),
        "PUT /hicache/storage-backend may name only these folders and folders below them",
        unset="--hicache-storage-path",
    )
    hicache_storage_secret_file: str | None = option(
        None,
        "file with the secret that all workers of a file store share: a page written without this secret is never "
        "used. Needed where others may write to the disk",
        unset="a file in the store's folder",
    )
    hicache_storage_size: float = option(
        DEFAULT_STORAGE_GB, "largest total size of the pages in the store", unit="GB", minimum=0.001
    )
    hicache_storage_prefetch_policy: str = option(
        "timeout",
        "how long a request waits for its pages from the store: not at all (best_effort), until all have come "
        "(wait_complete), or until all have come or the time set below is over (timeout)",
        choices=PREFETCH_POLICIES,
    )
    hicache_storage_prefetch_threshold: int = option(
        256, "fewest tokens worth fetching; fewer are computed again", unit="tokens", minimum=1
    )
    hicache_storage_prefetch_timeout_base_s: float = option(
        1.0, "policy timeout: longest wait, before the time for each 1000 tokens is added", unit="s", minimum=0
    )
    hicache_storage_prefetch_timeout_per_1k_s: float = option(
        0.25, "policy timeout: added to the longest wait for each 1000 tokens", unit="s", minimum=0
    )
    hicache_storage_deadline_s: float = option(
        10.0, "a store that takes longer than this for 128 pages is not used for a while", unit="s", minimum=0.1
    )

    def __post_init__(self) -> None:
        backend, path = self.hicache_storage_backend, self.hicache_storage_path
        if backend is None and (path is not None or self.hicache_storage_size != DEFAULT_STORAGE_GB):
            raise ConfigError(
                "--hicache-storage-path and --hicache-storage-size describe the store, which is off: add "
                "--hicache-storage-backend file",
                param="hicache_storage_backend",
            )
        if path == "":
            raise ConfigError(
                "--hicache-storage-path is empty: name a folder, or leave it out", param="hicache_storage_path"
            )
        if backend == "memory" and path is not None:
            raise ConfigError(
                "--hicache-storage-backend memory has no folder: leave --hicache-storage-path out, or say file",
                param="hicache_storage_path",
            )

    def prefetch(self) -> PrefetchConfig:
        return PrefetchConfig(
            policy=self.hicache_storage_prefetch_policy,
            base_s=self.hicache_storage_prefetch_timeout_base_s,
            per_1k_s=self.hicache_storage_prefetch_timeout_per_1k_s,
            threshold_tokens=self.hicache_storage_prefetch_threshold,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(RunnerOptions):
    """Travels from `kvist serve` to its engine as JSON. Raises `ConfigError` when settings contradict each other."""

    model_path: str | None = option(
        None,
        "Hugging Face model folder or GGUF file; without it the embedded SmolLM2-135M-Instruct is served",
        aliases=("model",),
    )
    served_model_name: str | None = option(None, "the model's name in the API; by default the folder's or file's name")
    role: str = option(
        UNIFIED,
        "prefill reads prompts and hands pages over, decode writes answers, unified does both",
        choices=(UNIFIED, PREFILL, DECODE),
    )
    cpu_affinity: bool = option(
        False,
        "with a GPU and 8 cores or more, run the engine and its gateway on different halves of the cores; with --tp "
        "only rank 0 of the engine is bound to its half",
    )
    engine_host: str = option("127.0.0.1", "address on which the engine's own socket listens")
    engine_port: int = option(0, "port of the engine's own socket; 0 finds a free one", minimum=0, maximum=65535)
    engine_advertise_host: str | None = option(
        None, "this host's name or address for other hosts, when --engine-host is a wildcard such as 0.0.0.0"
    )
    runtime_dir: str | None = option(
        None, "folder for page pools and lock files, shared by the workers of this host; by default in shared memory"
    )
    gateway_timeout_s: float = option(
        15.0, "requests of a gateway that is silent for this long are aborted", unit="s", minimum=0.1
    )
    engine_start_timeout_s: float = option(600.0, "longest time to load the model", unit="s", minimum=1)
    stall_restart_s: float = option(
        30.0,
        "a process that makes no progress for this long (stopped, blocked, or waiting for a device that hangs) is "
        "killed and started again",
        unit="s",
        minimum=1,
    )
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    channel: ChannelConfig = field(default_factory=ChannelConfig)
    host_tier: HostTierConfig = field(default_factory=HostTierConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    log: LogConfig = field(default_factory=LogConfig)

    worker_id: str = ""  # the worker's public name; its engine endpoint when empty

    def __post_init__(self) -> None:
        if self.tp > 1 and self.role != UNIFIED:
            raise ConfigError(
                f"--tp {self.tp} with --role {self.role}: tensor-parallel engines cannot hand pages over yet; "
                "use --tp 1, or --role unified",
                param="tp",
            )
        if self.storage != StorageConfig() and not self.host_tier.enable_hierarchical_cache:
            raise ConfigError(
                "the --hicache-storage options are of a store behind the host tier, and there is none: add "
                "--enable-hierarchical-cache",
                param="enable_hierarchical_cache",
            )
