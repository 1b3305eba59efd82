"""The settings of each verb, composed of the rooms' configs and read once at the start.

A verb's settings are one frozen dataclass; its fields are the rooms' configs, whose fields are the options. Flags
override environment variables, environment variables override the TOML file named by `--config`, and the file
overrides the defaults. Settings are read in no other place.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from kvist.bench.config import LOADS, CustomConfig, Load, TargetConfig
from kvist.channel import ChannelConfig, with_private_key
from kvist.cluster.config import (
    ChatConfig,
    ClusterConfig,
    GatewayOptions,
    JoinOptions,
    PairOptions,
    StartOptions,
    UnifiedOptions,
)
from kvist.cluster.plan import ClusterShape, threads_for_each, visible_gpus
from kvist.config import option
from kvist.cores import num_usable_cores
from kvist.engine.bench_shapes import StepsConfig
from kvist.engine.config import EndpointOptions, EngineConfig, EngineOptions, ModelOptions, NameOptions, RuntimeOptions
from kvist.errors import ConfigError
from kvist.flag_help import HelpPage, help_text
from kvist.flags import Shorthand, Sources, nearest, read_settings
from kvist.foreign_flags import REMEDIES
from kvist.log import LogConfig
from kvist.options import ENV_PREFIX, group, options_of, to_argv
from kvist.router.config import LinkOptions, RouterConfig, RoutingOptions
from kvist.runner.config import RunnerOptions
from kvist.server.config import ServerConfig
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
class FileConfig:
    config: Path | None = option(None, "TOML file with options, one `name = value` per line")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentConfig:
    stop_with_stdin: bool = option(
        False, "stop when standard input is closed, so that the process does not outlive its parent"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    model_path: str | None = option(
        None,
        "model folder or GGUF file with the tokenizer and chat template to use; by default those of the embedded model",
        aliases=("model",),
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
    channel: ChannelConfig = group(ChannelConfig)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)
    parent: ParentConfig = group(ParentConfig)


DEMO_HOST_TIER_GB = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class UpSettings:
    pair: PairOptions = group(PairOptions)
    alone: UnifiedOptions = group(UnifiedOptions)
    start: StartOptions = group(StartOptions)
    name: NameOptions = group(NameOptions)
    server: ServerConfig = group(ServerConfig)  # of the router; the workers are behind it, without TLS
    text: TextConfig = group(TextConfig)
    routing: RoutingOptions = group(RoutingOptions)
    links: LinkOptions = group(LinkOptions)
    engine: EngineOptions = group(EngineOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)
    parent: ParentConfig = group(ParentConfig)

    def __post_init__(self) -> None:
        self.cluster_config()

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
        return self.name, server, self.text, self.routing, self.links, self.log


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
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)
    parent: ParentConfig = group(ParentConfig)

    def __post_init__(self) -> None:
        self.cluster_config()

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
        argv, _secrets = to_argv((self.engine, name, self.log), ServeSettings)
        if self.chat.target is not None and self.chat.url is None:
            argv.append(f"--model-path={self.chat.target}")
        return argv


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


Settings = (
    ServeSettings
    | RouterSettings
    | UpSettings
    | DemoSettings
    | ChatSettings
    | BenchServerSettings
    | BenchEngineSettings
)

_SETTINGS: dict[str, type[Settings]] = {
    "serve": ServeSettings,
    "router": RouterSettings,
    "up": UpSettings,
    "demo": DemoSettings,
    "chat": ChatSettings,
    **{f"bench {kind}": _bench_settings(load) for kind, load in LOADS.items()},
    "bench custom": _bench_settings(CustomConfig),
    "bench engine": BenchEngineSettings,
}


_POSITIONAL = {
    "serve": "model_path",
    "router": "model_path",
    "up": "model_path",
    "chat": "target",
    "bench custom": "file",
}
_COMMON = {  # shown by `--help`; `--help-all` shows all
    *("model_path", "served_model_name", "host", "port", "api_key", "role", "tp", "mem_fraction_static", "dtype"),
    *("context_length", "max_running_requests", "enable_hierarchical_cache", "hicache_storage_backend", "log_level"),
    *(
        "prefill",
        "decode",
        "unified",
        "worker_urls",
        "router",
        "policy",
        "question",
        "base_url",
        "model",
        "seed",
        "config",
    ),
    *("target", "system", "max_tokens", "temperature", "stats"),
}


def help_for(verb: str, summary: str, *, everything: bool = True, bold: bool = False) -> str:
    """Return the verb's `--help-all`, or, without `everything`, its `--help`: the options that most users need."""
    argument = {"model_path": " [MODEL]", "file": " [FILE]", "target": " [URL or MODEL]", None: ""}[
        _POSITIONAL.get(verb)
    ]
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
        positional=_POSITIONAL.get(verb),
        remedies=REMEDIES,
    )
    return read_settings(_SETTINGS[verb], sources)


def run(settings: Settings) -> int:
    """Run the verb. The modules of a verb are imported here, so that a worker does not import the demo."""
    if isinstance(settings, ServeSettings):
        from kvist.cluster.serving import serve_worker

        return serve_worker(
            engine=settings.engine_config(),
            gateway=settings.gateway,
            links=settings.links,
            join=settings.join,
            stop_with_stdin=settings.parent.stop_with_stdin,
        )
    if isinstance(settings, RouterSettings):
        from kvist.cluster.serving import serve_router

        return serve_router(
            router=settings.router,
            model_path=settings.tokenizer.model_path,
            gateway=settings.gateway,
            channel=settings.channel,
            stop_with_stdin=settings.parent.stop_with_stdin,
        )
    if isinstance(settings, UpSettings):
        from kvist.checkpoint import find_checkpoint
        from kvist.cluster.up import run_up

        find_checkpoint(settings.engine.model.model_path)  # a wrong path is one error, before any process starts
        return run_up(cluster_shape(with_own_key(settings)), stop_with_stdin=settings.parent.stop_with_stdin)
    if isinstance(settings, ChatSettings):
        from kvist.cluster.chat import run_chat

        return run_chat(settings.chat, settings.serve_argv())
    if isinstance(settings, BenchServerSettings):
        return _run_bench(settings)
    if isinstance(settings, BenchEngineSettings):
        from kvist.engine.bench_engine import run_bench_engine

        return run_bench_engine(settings.steps, settings.model, settings.runner, settings.runtime)
    from kvist.cluster.demo import run_demo

    with tempfile.TemporaryDirectory(prefix="kvist-demo-") as folder:
        shape = cluster_shape(with_own_key(with_tiers(settings, folder)))
        return run_demo(shape, question=settings.demo.question, expect=settings.demo.expect)


ClusterSettings = TypeVar("ClusterSettings", UpSettings, DemoSettings)


def with_own_key(settings: ClusterSettings) -> ClusterSettings:
    """Give the cluster its own key, unless the user set one; children get the key through their environment."""
    engine = replace(settings.engine, channel=with_private_key(settings.engine.channel))
    return replace(settings, engine=engine)


def with_tiers(settings: DemoSettings, folder: str) -> DemoSettings:
    """Add a host tier and a store, small ones unless the user set them. The demo's short prompts are fetched, too."""
    host, store, page_size = settings.engine.host_tier, settings.engine.storage, settings.engine.runner.page_size
    if not host.enable_hierarchical_cache:
        host = replace(host, enable_hierarchical_cache=True, hicache_size=DEMO_HOST_TIER_GB)
    if store.hicache_storage_backend is None:
        store = replace(store, hicache_storage_backend="file", hicache_storage_options={"path": folder})
    store = replace(store, hicache_storage_prefetch_threshold=page_size)
    return replace(settings, engine=replace(settings.engine, host_tier=host, storage=store))


def _run_bench(settings: BenchServerSettings) -> int:
    from kvist.bench.verbs import run_custom, run_scenario

    load = settings.load
    if isinstance(load, CustomConfig):
        return run_custom(load, settings.target)
    kind = next(kind for kind, config in LOADS.items() if isinstance(load, config))
    return run_scenario(kind, load, settings.target)


def cluster_shape(settings: UpSettings | DemoSettings, environ: Mapping[str, str] = os.environ) -> ClusterShape:
    """Return the input of the plan: for each child its options, except those set by the plan."""
    engine, config = settings.engine, settings.cluster_config()
    runner, persist_folder = engine.runner, engine.host_tier.hicache_persist
    num_gpus = 0 if runner.device == "cpu" else visible_gpus(environ)
    planned = replace(
        engine,
        runner=replace(runner, num_threads=0, base_gpu_id=0 if num_gpus else runner.base_gpu_id),
        host_tier=replace(engine.host_tier, hicache_persist=None),
    )
    groups = (planned, *settings.passed_on())
    worker_argv, worker_environ = to_argv(groups, ServeSettings)
    router_argv, router_environ = to_argv(groups, RouterSettings)
    server = settings.server if isinstance(settings, UpSettings) else ServerConfig(port=0)
    is_default = runner.mem_fraction_static == RunnerOptions().mem_fraction_static
    return ClusterShape(
        config=config,
        worker_argv=tuple(worker_argv),
        worker_environ=worker_environ,
        router_argv=tuple(router_argv),
        router_environ=router_environ,
        router_host=server.host,
        router_port=server.port,
        api_keys=server.api_key,
        shows_all_lines=settings.log.log_level == "debug",
        threads_per_worker=runner.num_threads or threads_for_each(config.num_workers, num_usable_cores()),
        num_gpus=num_gpus,
        base_gpu_id=runner.base_gpu_id,
        gpus_per_worker=runner.tp,
        persist_folder=persist_folder,
        runtime_dir=engine.runtime.runtime_dir,
        memory_share=runner.mem_fraction_static if is_default else None,
        drain_s=max(server.shutdown_timeout_s, server.drain_grace_s),
        stall_restart_s=engine.watch.stall_restart_s,
    )
