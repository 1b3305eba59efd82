"""Runs the verb of the settings that were read: from settings to the function that does the work.

The modules of a verb are imported when it runs, so that a worker does not import the demo.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from kvist.bench.config import LOADS, CustomConfig
from kvist.channel import with_private_key
from kvist.cluster.plan import ClusterShape, threads_for_each, visible_gpus
from kvist.cluster.pool_plan import PoolShape
from kvist.cores import num_usable_cores
from kvist.engine.config import HostTierConfig, ModelOptions, TokenizerConfig
from kvist.errors import ConfigError
from kvist.hub import find_model
from kvist.nodes.config import STOP_MARGIN_S, JoinPoolOptions, PoolOptions, SegmentOptions
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
from kvist.options import given_values, to_argv
from kvist.progress import StartProgress
from kvist.runner.config import RunnerOptions
from kvist.server.config import ServerConfig
from kvist.settings import (
    BenchEngineSettings,
    BenchServerSettings,
    ChatSettings,
    DemoSettings,
    DeployRunSettings,
    ExplainSettings,
    MasterSettings,
    RouterSettings,
    ServeSettings,
    Settings,
    StoreSettings,
    UpSettings,
    read,
)

DEMO_HOST_TIER_GB = 0.25
DEMO_SEGMENT_GB = 0.25


def run(settings: Settings) -> int:
    """Run the verb; return its exit status. Raises `KvistError`."""
    settings = with_local_model(settings)
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
            listen_fd=settings.front.listen_fd,
        )
    if isinstance(settings, MasterSettings | StoreSettings | DrainSettings):
        return _run_node(settings)
    if isinstance(settings, RoleSettings):
        from kvist.operate.calls import switch_role

        return switch_role(settings.operated, settings.switch)
    if isinstance(settings, DrainServerSettings):
        from kvist.operate.calls import drain_server

        return drain_server(settings.operated)
    if isinstance(settings, RenderSettings):
        from kvist.deploy.render import run_render

        return run_render(settings.deployment(), settings.output.output, option_values)
    if isinstance(settings, DeployCheckSettings):
        from kvist.deploy.check import run_check

        return run_check(_named(settings.checked.file, "check"), option_values)
    if isinstance(settings, DeployRunSettings):
        return _run_manifest(settings)
    if isinstance(settings, UpSettings):
        from kvist.checkpoint import find_checkpoint
        from kvist.cluster.up import run_up
        from kvist.upgrade.verb import upgradable

        find_checkpoint(settings.engine.model.model_path)  # a wrong path is one error, before any process starts
        shape = cluster_shape(with_own_key(settings))
        return run_up(shape, beside=upgradable, stop_with_stdin=settings.parent.stop_with_stdin)
    if isinstance(settings, UpgradeSettings):
        from kvist.upgrade.verb import run_upgrade

        return run_upgrade(settings.upgrade, settings.runtime.runtime_dir)
    if isinstance(settings, TopSettings):
        from kvist.top.command import run_top

        return run_top(settings.operated, settings.top)
    if isinstance(settings, DoctorSettings):
        from kvist.doctor.command import run_doctor

        return run_doctor(settings.wants(), as_json=settings.doctor.json)
    if isinstance(settings, ChatSettings):
        from kvist.cluster.chat import run_chat

        return run_chat(settings.chat, settings.serve_argv())
    if isinstance(settings, ExplainSettings):
        from kvist.lang.explain_command import run_explain

        return run_explain(settings.explain)
    if isinstance(settings, BenchServerSettings):
        return _run_bench(settings)
    if isinstance(settings, BenchEngineSettings):
        from kvist.engine.bench_engine import run_bench_engine

        return run_bench_engine(settings.steps, settings.model, settings.runner, settings.runtime)
    from kvist.cluster.demo import run_demo

    with tempfile.TemporaryDirectory(prefix="kvist-demo-") as folder:
        shape = cluster_shape(with_own_key(with_tiers(settings, folder)))
        return run_demo(shape, question=settings.demo.question, expect=settings.demo.expect)


def _run_manifest(settings: DeployRunSettings) -> int:
    from kvist.deploy_run.run import LocalRun, run_local

    local = settings.local
    run = LocalRun(
        manifest=_named(local.file, "run"),
        api_key=local.api_key,
        claims=local.claim_folders,
        images=local.python_of_image,
        start_timeout_s=local.start_timeout_s,
        read_options=option_values,
    )
    return run_local(run, stop_with_stdin=settings.parent.stop_with_stdin)


def _named(manifest: Path | None, verb: str) -> Path:
    if manifest is None:
        raise ConfigError(f"name a manifest, as in kvist deploy {verb} cluster.yaml", param="file")
    return manifest


def option_values(verb: str, argv: Sequence[str], environ: Mapping[str, str]) -> Mapping[str, object]:
    """Return the values of a verb's options by key. Raises `ConfigError`."""
    return given_values(read(verb, argv, environ))


def _run_node(settings: MasterSettings | StoreSettings | DrainSettings) -> int:
    if isinstance(settings, DrainSettings):
        from kvist.nodes.drain import run_drain

        return run_drain(settings.drain)
    instance_id, stop_with_stdin = settings.instance.instance_id, settings.parent.stop_with_stdin
    if isinstance(settings, MasterSettings):
        from kvist.nodes.master import run_master

        return run_master(
            address=settings.address,
            keys=settings.keys,
            pool=settings.pool,
            instance_id=instance_id,
            stop_with_stdin=stop_with_stdin,
        )
    from kvist.nodes.store import run_store

    return run_store(
        address=settings.address,
        keys=settings.keys,
        segment=settings.segment,
        join=settings.join,
        instance_id=instance_id,
        stop_with_stdin=stop_with_stdin,
    )


AnySettings = TypeVar("AnySettings", bound=Settings)
AnyModel = TypeVar("AnyModel", ModelOptions, TokenizerConfig)


def with_local_model(settings: AnySettings) -> AnySettings:
    """Replace a model of the Hub by its local path, after a download if necessary: the processes that this one starts
    find it there. Raises `ConfigError`."""
    show = StartProgress()

    def local(model: AnyModel, *, weights: bool = True) -> AnyModel:
        path = find_model(model.model_path, model.revision, weights=weights, show=show)
        return replace(model, model_path=path, revision=None)

    if isinstance(settings, RouterSettings):
        return replace(settings, tokenizer=local(settings.tokenizer, weights=False))
    if isinstance(settings, BenchEngineSettings):
        return replace(settings, model=local(settings.model, weights=settings.runner.load_format != "dummy"))
    if isinstance(settings, ServeSettings | UpSettings | DemoSettings):
        engine = settings.engine
        model = local(engine.model, weights=engine.runner.load_format != "dummy")
        return replace(settings, engine=replace(engine, model=model))
    if isinstance(settings, ChatSettings) and settings.chat.url is None:
        engine, named = settings.engine, replace(settings.engine.model, model_path=settings.model_path)
        return replace(settings, chat=replace(settings.chat, target=None), engine=replace(engine, model=local(named)))
    return settings


ClusterSettings = TypeVar("ClusterSettings", UpSettings, DemoSettings)


def with_own_key(settings: ClusterSettings) -> ClusterSettings:
    """Give the cluster its own key, unless the user set one; children get the key through their environment."""
    engine = replace(settings.engine, channel=with_private_key(settings.engine.channel))
    return replace(settings, engine=engine)


def with_tiers(settings: DemoSettings, folder: str) -> DemoSettings:
    """Add a host tier and a store, small ones unless the user set them. The demo's short prompts are fetched, too."""
    page_size = settings.engine.runner.page_size
    host, store = settings.engine.host_tier, settings.engine.storage
    implied = settings.nodes.storage is not None and host == HostTierConfig(enable_hierarchical_cache=True)
    if implied or not host.enable_hierarchical_cache:
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


def pool_shape(settings: UpSettings | DemoSettings) -> PoolShape | None:
    """Return the page pool to start, if any."""
    if settings.nodes.storage is None:
        return None
    join = JoinPoolOptions()
    pool = settings.pool if isinstance(settings, UpSettings) else PoolOptions()
    segment = settings.segment if isinstance(settings, UpSettings) else SegmentOptions(segment_size=DEMO_SEGMENT_GB)
    if protocol := settings.engine.storage.hicache_storage_options.get("mooncake_protocol"):
        join = replace(join, hicache_mooncake_protocol=str(protocol))
    lent = replace(segment, ssd_path=None, ssd_size=None)  # each store has its own folder
    return PoolShape(
        num_stores=settings.nodes.stores,
        master_argv=tuple(to_argv((pool, settings.log), MasterSettings)[0]),
        store_argv=tuple(to_argv((lent, join, settings.log), StoreSettings)[0]),
        ssd_path=segment.ssd_path,
        ssd_size=segment.ssd_size,
        stop_s=0.0 if segment.ssd_path is None else join.flush_timeout_s + STOP_MARGIN_S,
    )


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
        pool=pool_shape(settings),
    )
