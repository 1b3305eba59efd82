"""The options of an engine, in groups, and the settings of one engine process. A flag that means the same as in SGLang
has SGLang's name."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvist.channel import ChannelConfig
from kvist.config import option
from kvist.errors import ConfigError
from kvist.grammar.config import GrammarOptions
from kvist.kv.tiers.write_policy import WRITE_POLICIES
from kvist.log import LogConfig
from kvist.request import Role
from kvist.runner.config import RunnerOptions
from kvist.scheduler.config import SchedulerOptions
from kvist.store.config import StorageConfig
from kvist.transfer.config import TransferConfig

DEFAULT_RATIO, DEFAULT_POLICY = 2.0, "write_through"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTierConfig:
    """The cache's second tier (docs/cache.md). Raises `ConfigError` when settings contradict each other."""

    enable_hierarchical_cache: bool = option(
        False, "also keep pages in host memory, and load them from there instead of computing them again"
    )
    hicache_ratio: float = option(
        DEFAULT_RATIO, "number of host-tier pages, as a multiple of the number of device-pool pages", minimum=0.01
    )
    hicache_size: float | None = option(
        None, "size of the host tier, instead of --hicache-ratio", unit="GB", minimum=0.001, unset="by --hicache-ratio"
    )
    hicache_write_policy: str = option(
        DEFAULT_POLICY,
        "when a page is copied to the host tier: as soon as it is computed (write_through), after its second hit "
        "(write_through_selective), or when it is about to be evicted from the device pool (write_back)",
        choices=tuple(WRITE_POLICIES),
    )
    hicache_persist: str | None = option(
        None,
        "folder in which the host tier's pages survive a restart; each worker needs its own. With a GPU, use a folder "
        "in shared memory (/dev/shm)",
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
                "the --hicache options need the host tier, which is off: add --enable-hierarchical-cache",
                param="enable_hierarchical_cache",
            )
        if sized and self.hicache_size is not None:
            raise ConfigError(
                f"--hicache-ratio {self.hicache_ratio:g} and --hicache-size {self.hicache_size:g} both set the size of "
                "the host tier: give one of them",
                param="hicache_size",
            )


REVISION_HELP = "branch, tag or commit of a model of the Hugging Face Hub; by default its main branch"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    model_path: str | None = option(
        None,
        "model folder or GGUF file, or a model of the Hugging Face Hub: ORG/NAME or ORG/NAME/FILE.gguf; by default the "
        "embedded SmolLM2-135M-Instruct",
        aliases=("model",),
    )
    revision: str | None = option(None, REVISION_HELP)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """The model of a gateway, which has no engine of its own."""

    model_path: str | None = option(
        None,
        "model with the tokenizer and chat template to use: a folder, a GGUF file or ORG/NAME of the Hugging Face Hub; "
        "by default the embedded model",
        aliases=("model",),
    )
    revision: str | None = option(None, REVISION_HELP)


@dataclass(frozen=True, slots=True, kw_only=True)
class NameOptions:
    served_model_name: str | None = option(
        None, "the model's name in the API; by default the name of its folder or file"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """The role and the socket of one engine. `kvist up` sets both itself."""

    role: Role = option(
        Role.UNIFIED,
        "prefill computes prompts and hands their pages to decode, decode generates the answers, unified does both",
        choices=tuple(Role),
    )
    engine_host: str = option("127.0.0.1", "address on which the engine's socket listens")
    engine_port: int = option(0, "port of the engine's socket; 0 chooses a free port", minimum=0, maximum=65535)
    engine_advertise_host: str | None = option(
        None,
        "this host's name or address for other hosts; needed if --engine-host is a wildcard such as 0.0.0.0",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    runtime_dir: str | None = option(
        None, "folder of the page pools and lock files, shared by all workers of this host; by default in shared memory"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """The times for which the engine and its parent wait for a silent process."""

    gateway_timeout_s: float = option(
        15.0, "abort the requests of a gateway that has sent nothing for this long", unit="s", minimum=0.1
    )
    engine_start_timeout_s: float = option(600.0, "maximum time to load the model", unit="s", minimum=1)
    stall_restart_s: float = option(
        30.0,
        "kill and restart a process that makes no progress for this long: one that is suspended, blocked, or waits for "
        "a device that hangs",
        unit="s",
        minimum=1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The options of every verb that starts engines. Raises `ConfigError` when settings contradict each other."""

    model: ModelOptions = field(default_factory=ModelOptions)
    runner: RunnerOptions = field(default_factory=RunnerOptions)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    watch: WatchOptions = field(default_factory=WatchOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    channel: ChannelConfig = field(default_factory=ChannelConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    host_tier: HostTierConfig = field(default_factory=HostTierConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    grammar: GrammarOptions = field(default_factory=GrammarOptions)

    def __post_init__(self) -> None:
        if self.storage != StorageConfig() and not self.host_tier.enable_hierarchical_cache:
            raise ConfigError(
                "the --hicache-storage options need the host tier, which is off: add --enable-hierarchical-cache",
                param="enable_hierarchical_cache",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The settings that `kvist serve` sends to its engine as JSON. Raises `ConfigError` when settings contradict."""

    options: EngineOptions = field(default_factory=EngineOptions)
    endpoint: EndpointOptions = field(default_factory=EndpointOptions)
    name: NameOptions = field(default_factory=NameOptions)
    log: LogConfig = field(default_factory=LogConfig)
    present_role: Role | None = None  # that an earlier process of this worker was switched to; None: `endpoint.role`
    worker_id: str = ""  # the worker's public name; empty: its engine endpoint
