"""The settings of each verb, composed of the rooms' configs and read once at the start.

A verb's settings are one frozen dataclass; its fields are the rooms' configs, whose fields are the options. Flags
override environment variables, environment variables override the TOML file named by `--config`, and the file
overrides the defaults. Settings are read in no other place.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kvist.agents_api.config import AgentApiOptions
from kvist.bench.config import LOADS, CustomConfig, Load, TargetConfig
from kvist.channel import ChannelConfig
from kvist.cluster.config import (
    IMPLIED_BY_POOL,
    ChatConfig,
    ClusterConfig,
    FrontOptions,
    GatewayOptions,
    JoinOptions,
    PairOptions,
    PoolNodesOptions,
    StartOptions,
    UnifiedOptions,
)
from kvist.config import option
from kvist.deploy_run.config import LocalRunOptions
from kvist.engine.bench_shapes import StepsConfig
from kvist.engine.config import (
    EndpointOptions,
    EngineConfig,
    EngineOptions,
    ModelOptions,
    NameOptions,
    RuntimeOptions,
    TokenizerConfig,
)
from kvist.errors import ConfigError
from kvist.flag_help import HelpPage, help_text
from kvist.flags import FileConfig, Shorthand, Sources, nearest, read_settings
from kvist.flight.config import FlightOptions
from kvist.foreign_flags import REMEDIES
from kvist.lang.explain_command import ExplainOptions
from kvist.log import LogConfig
from kvist.nodes.config import (
    JoinPoolOptions,
    MasterAddress,
    NodeKeyOptions,
    PoolOptions,
    SegmentOptions,
    StoreAddress,
)
from kvist.operator_settings import (
    DeployCheckSettings,
    DoctorSettings,
    DrainServerSettings,
    DrainSettings,
    RenderSettings,
    RoleSettings,
    TopSettings,
    UpgradeSettings,
)
from kvist.options import ENV_PREFIX, Option, group, options_of, to_argv
from kvist.router.config import LinkOptions, RouterConfig, RoutingOptions
from kvist.runner.config import RunnerOptions
from kvist.server.config import InstanceOptions, ServerConfig
from kvist.text.config import TextConfig

SHORTHANDS = (
    Shorthand(flag="--decode-only", key="role", value="decode", text="the same as --role decode"),
    Shorthand(
        flag="--disaggregation-mode",
        key="role",
        renamed=(("null", "unified"),),
        text="the same as --role, as SGLang names it; null means unified",
    ),
    Shorthand(
        flag="--sampling-defaults",
        key="generation_config",
        renamed=(("model", "auto"), ("openai", "vllm")),
        text="the same as --generation-config, as SGLang names it: model or openai",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentConfig:
    stop_with_stdin: bool = option(
        False, "stop when standard input is closed, so that the process does not outlive its parent"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    engine: EngineOptions = group(EngineOptions)
    endpoint: EndpointOptions = group(EndpointOptions)
    gateway: GatewayOptions = group(GatewayOptions)
    links: LinkOptions = group(LinkOptions)
    join: JoinOptions = group(JoinOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)
    parent: ParentConfig = group(ParentConfig)

    def __post_init__(self) -> None:
        self.engine_config()  # contradictions are reported before anything starts

    def engine_config(self) -> EngineConfig:
        return EngineConfig(options=self.engine, endpoint=self.endpoint, name=self.gateway.name, log=self.log)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    router: RouterConfig = group(RouterConfig)
    tokenizer: TokenizerConfig = group(TokenizerConfig)
    gateway: GatewayOptions = group(GatewayOptions)
    front: FrontOptions = group(FrontOptions)
    channel: ChannelConfig = group(ChannelConfig)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)
    parent: ParentConfig = group(ParentConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpSettings:
    pair: PairOptions = group(PairOptions)
    alone: UnifiedOptions = group(UnifiedOptions)
    start: StartOptions = group(StartOptions)
    name: NameOptions = group(NameOptions)
    server: ServerConfig = group(ServerConfig)  # of the router; the workers are behind it, without TLS
    text: TextConfig = group(TextConfig)
    agents: AgentApiOptions = group(AgentApiOptions)
    flight: FlightOptions = group(FlightOptions)
    routing: RoutingOptions = group(RoutingOptions)
    links: LinkOptions = group(LinkOptions)
    engine: EngineOptions = group(EngineOptions)
    nodes: PoolNodesOptions = group(PoolNodesOptions)
    pool: PoolOptions = group(PoolOptions)
    segment: SegmentOptions = group(SegmentOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)
    parent: ParentConfig = group(ParentConfig)

    def __post_init__(self) -> None:
        self.cluster_config()
        self.engine.storage.check_one_tier(self.nodes.storage)
        if self.nodes.storage is None and (self.pool, self.segment) != (PoolOptions(), SegmentOptions()):
            raise ConfigError("the options of a page pool need one: add --storage mooncake", param="storage")

    def cluster_config(self) -> ClusterConfig:
        pair = self.pair
        return ClusterConfig(
            prefill=pair.prefill,
            decode=pair.decode,
            unified=self.alone.unified,
            start_timeout_s=self.start.start_timeout_s,
        )

    def passed_on(self) -> tuple[object, ...]:
        """Return the groups of options that are passed to the workers and the router; each takes the options it has."""
        server = replace(self.server, host=ServerConfig().host, port=ServerConfig().port)
        apis = self.agents, self.flight, self.engine.grammar
        return self.name, server, self.text, *apis, self.routing, self.links, self.log


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    question: str = option("What is the capital of France?", "the first question")
    expect: str = option("Paris", "fail unless the answer contains this text; empty accepts every answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    demo: DemoConfig = group(DemoConfig)
    pair: PairOptions = group(PairOptions)
    start: StartOptions = group(StartOptions)
    name: NameOptions = group(NameOptions)
    engine: EngineOptions = group(EngineOptions)
    nodes: PoolNodesOptions = group(PoolNodesOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)
    parent: ParentConfig = group(ParentConfig)

    def __post_init__(self) -> None:
        self.cluster_config()
        self.engine.storage.check_one_tier(self.nodes.storage)

    def cluster_config(self) -> ClusterConfig:
        return ClusterConfig(
            prefill=self.pair.prefill, decode=self.pair.decode, start_timeout_s=self.start.start_timeout_s
        )

    def passed_on(self) -> tuple[object, ...]:
        return self.name, self.log


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    chat: ChatConfig = group(ChatConfig)
    engine: EngineOptions = group(EngineOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)

    def __post_init__(self) -> None:
        if self.chat.target and self.engine.model.model_path:
            raise ConfigError(
                f"--model-path {self.engine.model.model_path} and {self.chat.target} are two targets of the chat: "
                "give only one of them",
                param="target",
            )

    def serve_argv(self) -> list[str]:
        """Return the options of the server that is started for the chat."""
        name = NameOptions(served_model_name=self.chat.served_model_name)
        model = replace(self.engine.model, model_path=self.model_path)
        argv, _secrets = to_argv((replace(self.engine, model=model), name, self.log), ServeSettings)
        return argv

    @property
    def model_path(self) -> str | None:
        """The model of the server that is started for the chat."""
        return self.engine.model.model_path if self.chat.url or self.chat.target is None else self.chat.target


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchServerSettings:
    """The settings of a benchmark of a server. Each scenario has a subclass, whose `load` is its own config."""

    target: TargetConfig = group(TargetConfig)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)
    load: Load | CustomConfig


def _bench_settings(load: type[Load | CustomConfig]) -> type[BenchServerSettings]:
    return dataclasses.make_dataclass(
        "BenchSettings",
        [("load", load, group(load))],
        bases=(BenchServerSettings,),
        frozen=True,
        slots=True,
        kw_only=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchEngineSettings:
    steps: StepsConfig = group(StepsConfig)
    model: ModelOptions = group(ModelOptions)
    runner: RunnerOptions = group(RunnerOptions)
    runtime: RuntimeOptions = group(RuntimeOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class MasterSettings:
    address: MasterAddress = group(MasterAddress)
    keys: NodeKeyOptions = group(NodeKeyOptions)
    pool: PoolOptions = group(PoolOptions)
    instance: InstanceOptions = group(InstanceOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)
    parent: ParentConfig = group(ParentConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    address: StoreAddress = group(StoreAddress)
    keys: NodeKeyOptions = group(NodeKeyOptions)
    segment: SegmentOptions = group(SegmentOptions)
    join: JoinPoolOptions = group(JoinPoolOptions)
    instance: InstanceOptions = group(InstanceOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)
    parent: ParentConfig = group(ParentConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployRunSettings:
    local: LocalRunOptions = group(LocalRunOptions)
    log: LogConfig = group(LogConfig)
    config: FileConfig = group(FileConfig)
    parent: ParentConfig = group(ParentConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainSettings:
    explain: ExplainOptions = group(ExplainOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)


Settings = (
    ServeSettings
    | RouterSettings
    | MasterSettings
    | StoreSettings
    | DrainSettings
    | RoleSettings
    | DrainServerSettings
    | RenderSettings
    | DeployCheckSettings
    | UpgradeSettings
    | DeployRunSettings
    | UpSettings
    | DemoSettings
    | ChatSettings
    | DoctorSettings
    | TopSettings
    | ExplainSettings
    | BenchServerSettings
    | BenchEngineSettings
)

_SETTINGS: dict[str, type[Settings]] = {
    "serve": ServeSettings,
    "router": RouterSettings,
    "master": MasterSettings,
    "store": StoreSettings,
    "store drain": DrainSettings,
    "role": RoleSettings,
    "drain": DrainServerSettings,
    "deploy render": RenderSettings,
    "deploy check": DeployCheckSettings,
    "upgrade": UpgradeSettings,
    "deploy run": DeployRunSettings,
    "up": UpSettings,
    "demo": DemoSettings,
    "chat": ChatSettings,
    "doctor": DoctorSettings,
    "top": TopSettings,
    "lang explain": ExplainSettings,
    **{f"bench {kind}": _bench_settings(load) for kind, load in LOADS.items()},
    "bench custom": _bench_settings(CustomConfig),
    "bench engine": BenchEngineSettings,
}


_POSITIONAL: dict[str, tuple[str, ...]] = {
    "serve": ("model_path",),
    "router": ("model_path",),
    "up": ("model_path",),
    "doctor": ("model_path",),
    "store drain": ("store",),
    "role": ("worker", "role"),
    "drain": ("url",),
    "top": ("url",),
    "chat": ("target",),
    "lang explain": ("program",),
    "bench custom": ("file",),
    "deploy check": ("file",),
    "deploy run": ("file",),
}
_ARGUMENTS = {
    "model_path": "[MODEL]",
    "file": "[FILE]",
    "target": "[URL or MODEL]",
    "store": "URL",
    "url": "[URL]",
    "worker": "WORKER",
    "role": "ROLE",
    "program": "FILE:FUNCTION",
}
_COMMON = {  # shown by `--help`; `--help-all` shows all
    *("model_path", "served_model_name", "host", "port", "api_key", "role", "tp", "mem_fraction_static", "dtype"),
    *("context_length", "max_running_requests", "enable_hierarchical_cache", "hicache_storage_backend", "log_level"),
    *(
        "prefill",
        "decode",
        "unified",
        "storage",
        "stores",
        "worker_urls",
        "router",
        "policy",
        "question",
        "base_url",
        "model",
        "seed",
        "config",
    ),
    *("url", "worker", "target", "system", "max_tokens", "temperature", "stats"),
    *("arguments", "html"),
    *("rpc_port", "hot_page_replication", "hot_page_replicas", "hicache_mooncake_master_addr", "segment_size"),
    *("ssd_path", "ssd_size", "hicache_mooncake_protocol", "store", "timeout_s"),
    *("format", "name", "image", "device", "hicache_size", "output"),
    *("python", "order", "json", "torch", "once", "interval_s", "engine_port", "hicache_storage_path"),
}


def options_for(verb: str) -> list[Option]:
    """Return the options of a verb."""
    return options_of(_SETTINGS[verb])


def help_for(verb: str, summary: str, *, everything: bool = True, bold: bool = False) -> str:
    """Return the verb's `--help-all`, or, without `everything`, its `--help`: the options that most users need."""
    argument = "".join(f" {_ARGUMENTS[key]}" for key in _POSITIONAL.get(verb, ()))
    shown = None if everything or verb.startswith("bench") else _COMMON
    return help_text(
        _SETTINGS[verb],
        HelpPage(
            usage=f"kvist {verb}{argument} [options]",
            summary=summary[0].upper() + summary[1:] + ".",
            shorthands=SHORTHANDS,
            only=shown,
            bold=bold,
        ),
    )


def read(verb: str, argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Read the verb's settings. Raises `ConfigError` naming the wrong flag, variable or key."""
    known = {option.key for settings_class in _SETTINGS.values() for option in options_of(settings_class)}
    for name in environ:
        key = name.removeprefix(ENV_PREFIX).lower()
        if name.startswith(ENV_PREFIX) and key not in known:
            # not an error: a Kubernetes Service named kvist also sets such variables
            names = [ENV_PREFIX + each.upper() for each in sorted(known)]
            print(f"kvist: the environment variable {name} sets no option{nearest(name, names)}", file=sys.stderr)
    sources = Sources(
        argv=argv,
        environ=environ,
        shorthands=SHORTHANDS,
        other_keys=sorted(known),
        positional=_POSITIONAL.get(verb, ()),
        remedies=REMEDIES,
        implied=IMPLIED_BY_POOL,
    )
    return read_settings(_SETTINGS[verb], sources)
