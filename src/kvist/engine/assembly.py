"""Builds one engine from its settings (model, pages, scheduler, sockets, transport, loop), and closes it.

The role decides only which requests the scheduler admits, and the limits of a step: all parts are the same. The parts
are closed in the opposite order of their creation: the store, the mover and the transport first, so that no copy
continues, then sockets, runner and pool, and last the lock of the epoch, whose release shows peers that the engine has
ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from kvist.channel import EngineChannel, Member, bracketed, split_tcp_endpoint, with_cluster_key
from kvist.checkpoint import Checkpoint, find_checkpoint
from kvist.clock import Clock, MonotonicClock, thread_cpu_clock
from kvist.cores import num_usable_cores
from kvist.engine.config import EngineConfig, HostTierConfig, ModelOptions
from kvist.engine.grammar_jobs import GrammarJobs
from kvist.engine.limits import resolve_limits, usual_step_tokens
from kvist.engine.loop import EngineLoop, LoopParts
from kvist.engine.page_events import PageEventLog
from kvist.engine.reports import LoadReports
from kvist.engine.roles import RoleSwitch
from kvist.engine.step_waiter import StepWaiter
from kvist.engine.watchdog import Watchdog
from kvist.errors import ConfigError
from kvist.fingerprint import Background, model_fingerprint
from kvist.grammar.compiler import GrammarCompiler
from kvist.kv.cache import PageCache
from kvist.kv.layout import namespace
from kvist.kv.tiers.host import HostTier
from kvist.kv.tiers.storage import StorageTier
from kvist.memory.device_pool import DevicePool
from kvist.memory.host_memory import available_host_bytes
from kvist.memory.host_pool import HostPool, plan_host_pages
from kvist.memory.page_copier import PageMover
from kvist.memory.persistence import PersistentPages, reusable_bytes
from kvist.memory.runtime_dir import allocation_lock, host_id, remove_leftovers
from kvist.memory.runtime_dir import runtime_dir as user_runtime_dir
from kvist.models import ModelConfig, load_model_config
from kvist.page_readers.reads import read_by_processes
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.plan.compat import peer_spec
from kvist.request import EpochId, RequestId, SamplingParams, SlotId, WorkerId
from kvist.runner.build import BuildProgress, build_runner
from kvist.runner.config import RunnerLimits, RunnerOptions
from kvist.runner.grammars import grammar_compiler
from kvist.runner.resolve import device_type
from kvist.runner.runner import AnyRunner, Runner
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.store.backend import HostMemory, StoreContext
from kvist.store.config import StorageConfig
from kvist.store.control import StorageControl
from kvist.store.mover import StoreMover
from kvist.text.fingerprint import tokenizer_fingerprint
from kvist.transfer import make_transports
from kvist.transfer.epoch import EpochLock, num_live_epochs, sweep
from kvist.wire import EngineSpec, PoolAddress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    spec: EngineSpec
    loop: EngineLoop
    watchdog: Watchdog  # of the loop; not started
    closing: contextlib.ExitStack

    def close(self) -> None:
        """Close the engine. Call after the loop has ended."""
        self.closing.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model that this engine serves, and its checkpoint."""

    checkpoint: Checkpoint
    config: ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprints:
    """The fingerprints of the served model: engines and a router work together only if theirs are equal."""

    model: str
    tokenizer: str  # "": no tokenizer


def build_engine(config: EngineConfig, *, progress: Callable[[str], None]) -> Engine:
    """Build an engine that is ready to serve. Raises `ConfigError` or `ModelLoadError`, and then leaves nothing
    behind."""
    with contextlib.ExitStack() as closing:
        runtime_dir = user_runtime_dir(config.options.runtime.runtime_dir)
        sweep(runtime_dir)
        closing.callback(remove_leftovers, runtime_dir)  # called after our own lock is released
        channel = with_cluster_key(config.options.channel)
        config = dataclasses.replace(config, options=dataclasses.replace(config.options, channel=channel))
        member = Member(channel.cluster_key)
        closing.callback(EpochLock(runtime_dir, member.epoch).close)
        options = config.options
        served = find_served_model(options.model, options.scheduler.context_length)
        # In parallel with loading, which reads the same files and does not use all cores.
        fingerprinting = Background(
            partial(compute_fingerprints, served.checkpoint, options.runner), "kvist-fingerprint"
        )
        limits = resolve_limits(options.scheduler, device=device_type(options.runner.device), role=config.endpoint.role)
        logger.info(
            "a step takes up to %d requests, usually %d tokens and at most %d; the next step is planned %s",
            limits.max_running_requests,
            limits.chunked_prefill_size,
            limits.max_prefill_tokens,
            "during the current one" if limits.overlap else "after the current one",
        )
        runner_limits = RunnerLimits(
            context_length=options.scheduler.context_length,
            max_running_requests=limits.max_running_requests,
            max_batch_tokens=limits.max_prefill_tokens,
        )
        # reads the tokenizer in parallel with the weights
        grammars = grammar_compiler(options.grammar.grammar_backend, served.checkpoint, served.config)
        closing.callback(grammars.close)
        runner = load_runner(
            options.runner, runner_limits, served, runtime_dir, progress, grammars, options.grammar.grammar_backend
        )
        closing.callback(runner.close)
        logger.info("page pool: %s", runner.pool_reason)
        warm_up(runner, progress)
        freeze_gc()
        fingerprints = fingerprinting.result()
        return _assemble(
            config, limits, served, fingerprints, runner, grammars, member, runtime_dir, progress, closing.pop_all()
        )


def freeze_gc() -> None:
    """Exclude all current objects, mainly the model and libraries, from garbage collection. A step creates and drops a
    thousand objects without cycles; by default they would be collected every 700 objects, which takes a tenth of the
    step's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def _num_cores_for_us(runtime_dir: Path) -> int:
    return max(1, num_usable_cores() // num_live_epochs(runtime_dir))


# ---------------------------------------------------------------- model and pages


def find_served_model(model: ModelOptions, context_length: int | None = None) -> ServedModel:
    """Find the model. Raises `ConfigError` if the model was not trained for `context_length` tokens."""
    checkpoint = find_checkpoint(model.model_path)
    model_config = load_model_config(checkpoint)
    trained_for = model_config.max_position_embeddings
    if context_length is not None and context_length > trained_for:
        raise ConfigError(
            f"--context-length {context_length} is more than the model was trained for ({trained_for} tokens)",
            param="context_length",
        )
    return ServedModel(checkpoint=checkpoint, config=model_config)


def compute_fingerprints(checkpoint: Checkpoint, options: RunnerOptions) -> Fingerprints:
    """Compute both fingerprints. Raises `ModelLoadError`."""
    is_dummy = options.load_format == "dummy"
    # Dummy weights of another seed give other pages for the same checkpoint.
    suffix = f"-dummy-{options.random_seed}" if is_dummy else ""
    return Fingerprints(
        model=model_fingerprint(checkpoint, with_weights=not is_dummy) + suffix,
        tokenizer=tokenizer_fingerprint(checkpoint),
    )


def in_tenths(progress: Callable[[str], None]) -> BuildProgress:
    """Return a function that gets (stage, number done, number of all) and reports every tenth of a stage."""
    last = ("", -1)

    def report(stage: str, num_done: int, num_all: int) -> None:
        nonlocal last
        tenth = 10 * num_done // num_all
        if stage != last[0] or tenth > last[1]:
            last = (stage, tenth)
            progress(f"{stage} {10 * tenth}%")

    return report


def load_runner(
    options: RunnerOptions,
    limits: RunnerLimits,
    served: ServedModel,
    runtime_dir: Path,
    progress: Callable[[str], None],
    grammars: GrammarCompiler | None = None,
    grammar_backend: str = "llguidance",
) -> AnyRunner:
    if not options.num_threads:
        options = dataclasses.replace(options, num_threads=_num_cores_for_us(runtime_dir))
    return build_runner(
        served.checkpoint,
        served.config,
        options,
        limits,
        runtime_dir=runtime_dir,
        progress=in_tenths(progress),
        grammars=grammars,
        grammar_backend=grammar_backend,
    )


def warm_up(runner: AnyRunner, progress: Callable[[str], None]) -> None:
    """Run one prompt chunk and one decode step, so that the first request does not wait for torch's setup on first use.
    Both write to page 0, which no request owns yet."""
    report = in_tenths(progress)
    slot, page_size = SlotId(0), runner.pool.layout.page_size
    start = StartRequest(
        slot=slot,
        request_id=RequestId("warm-up"),
        sampling=SamplingParams(max_tokens=1, temperature=0.0),
        token_ids=(0,) * page_size,
        num_prompt_tokens=page_size,
    )
    items = [
        BatchItem(slot=slot, token_ids=(0,) * num_tokens, start=first, page_ids=(0,), samples=True)
        for first, num_tokens in ((0, page_size - 1), (page_size - 1, 1))
        if num_tokens
    ]
    batches = [
        Batch(step_id=0, started=(start,), items=()),
        *(Batch(step_id=0, items=(item,)) for item in items),
        Batch(step_id=0, ended=(slot,), items=()),
    ]
    for num_done, batch in enumerate(batches):
        report("warming up", num_done, len(batches))
        runner.launch(batch).result()
    report("warming up", len(batches), len(batches))


# ---------------------------------------------------------------- assembly


def _assemble(
    config: EngineConfig,
    limits: SchedulerConfig,
    served: ServedModel,
    fingerprints: Fingerprints,
    runner: AnyRunner,
    grammars: GrammarCompiler,
    member: Member,
    runtime_dir: Path,
    progress: Callable[[str], None],
    closing: contextlib.ExitStack,
) -> Engine:
    with closing:  # closes every part after an error
        pool, options, endpoint = runner.pool, config.options, config.endpoint
        channel = EngineChannel(
            f"tcp://{bracketed(endpoint.engine_host)}:{endpoint.engine_port or '*'}",
            member=member,
            config=options.channel,
            advertise_host=endpoint.engine_advertise_host,
        )
        closing.callback(channel.close)
        waiter = StepWaiter(channel.wakeup)
        closing.callback(waiter.close)
        advertised_host = (split_tcp_endpoint(channel.endpoint) or ("127.0.0.1", ""))[0]
        if not endpoint.role.serves_alone:
            pool.open_ranks()
        transports = make_transports(
            pool,
            runtime_dir=runtime_dir,
            wakeup=channel.wakeup,
            names=options.transfer.disaggregation_transfer_backend,
            given=options.transfer.disaggregation_transfer_options,
            advertised_host=advertised_host,
        )
        closing.callback(transports.close)
        if not transports.addresses and not endpoint.role.serves_alone:
            raise ConfigError(
                f"--role {endpoint.role}: no transport works with this pool: {pool.export_error}", param="role"
            )
        reach = _Reach(pool=pool, host_id=host_id(runtime_dir), transports=transports.addresses)
        spec = _describe(config, limits, served, fingerprints, reach, member.epoch, channel.endpoint)
        scheduler_config = dataclasses.replace(
            limits,
            max_model_len=spec.max_model_len,
            eos_token_ids=served.config.eos_token_ids,
            grammar_compile_timeout_s=options.grammar.grammar_compile_timeout_s,
        )
        clock = MonotonicClock()
        pool_closing = closing.enter_context(contextlib.ExitStack())
        with allocation_lock(runtime_dir):
            host_pool = make_host_pool(options.host_tier, pool, spec.namespace, pool_closing)
        host_tier: HostTier | None = None
        mover: PageMover | None = None
        storage: StorageControl | None = None
        if host_pool is not None:
            host_tier = HostTier(host_pool.tensor.shape[0])
            spec = msgspec.structs.replace(spec, num_host_pages=host_tier.num_pages)
            if host_pool.persistent is not None:
                restored = partial(in_tenths(progress), "restoring cached pages")
                host_tier.restore(host_pool.persistent.restore(restored))
            mover = PageMover(pool, host_pool, wakeup=channel.wakeup, clock=clock)
            closing.callback(mover.close)
            context = store_context(options.storage, host_pool, spec.namespace, advertised_host)
            storage = make_storage(options.storage, host_pool, context, channel.wakeup, clock)
            closing.callback(_close_storage, storage, pool_closing)
            storage.open_configured()
        cache = PageCache(
            num_pages=pool.num_pages,
            page_size=options.runner.page_size,
            namespace=spec.namespace,
            host=host_tier,
            write_policy=options.host_tier.hicache_write_policy,
            storage=None
            if host_tier is None
            else StorageTier(host_tier, options.storage.prefetch(), page_size=options.runner.page_size),
        )
        parts = LoopParts(
            spec=spec,
            scheduler=build_scheduler(
                endpoint.role,
                scheduler_config,
                cache,
                member.epoch,
                peer_spec(spec),
            ),
            runner=runner,
            channel=channel,
            transport=transports,
            access=transports,
            reports=LoadReports(),
            page_events=PageEventLog(list_pages=cache.list_pages),
            mover=mover,
            storage=storage,
            clock=clock,
            gateway_timeout_s=options.watch.gateway_timeout_s,
            watch_step=waiter.watch,
            roles=RoleSwitch(
                endpoint.role,
                present=config.present_role,
                usual_step_tokens=usual_step_tokens(
                    options.scheduler, limits, device=device_type(options.runner.device)
                ),
                hands_over=bool(transports.addresses),
            ),
            grammars=GrammarJobs(grammars, channel.wakeup),
            overlap=limits.overlap,
        )
        loop = EngineLoop(parts)
        if isinstance(runner, Runner):  # not with --tp or a GPU: other ranks, or the GPU, would continue
            runner.between_layers = loop.between_layers
        watchdog = Watchdog(
            lambda: loop.num_iterations,
            limit_s=options.watch.stall_restart_s,
            loop_cpu_s=None if pool.tensor.is_cuda else thread_cpu_clock(threading.get_ident()),
        )
        closing.callback(watchdog.stop)
        return Engine(spec=spec, loop=loop, watchdog=watchdog, closing=closing.pop_all())


def make_host_pool(
    config: HostTierConfig, pool: DevicePool, namespace: str, closing: contextlib.ExitStack
) -> HostPool | None:
    """Return the host pool, or None without a host tier. Raises `ConfigError` when host memory is too small."""
    if not config.enable_hierarchical_cache:
        return None
    page_bytes = pool.whole_layout.page_bytes
    on_gpu = pool.tensor.is_cuda
    available_bytes = available_host_bytes()
    folder = None if config.hicache_persist is None else Path(config.hicache_persist).expanduser()
    if folder is not None:
        available_bytes += reusable_bytes(folder)
    num_pages = plan_host_pages(
        page_bytes,
        num_device_pages=pool.num_pages,
        ratio=config.hicache_ratio,
        size_gb=config.hicache_size,
        available_bytes=available_bytes,
    )
    logger.info(
        "host tier: %d tokens (%d pages), %.2f GiB, %s",
        num_pages * pool.layout.page_size,
        num_pages,
        num_pages * page_bytes / 2**30,
        config.hicache_write_policy,
    )
    persistent: PersistentPages | None = None
    if folder is not None:
        persistent = PersistentPages(folder, namespace=namespace, num_pages=num_pages, page_bytes=page_bytes)
        closing.callback(persistent.close)
    host_pool = HostPool(num_pages, page_bytes, pinned=on_gpu, persistent=persistent)
    closing.callback(host_pool.close)
    return host_pool


def store_context(config: StorageConfig, host_pool: HostPool, namespace: str, advertised_host: str) -> StoreContext:
    """Return what the stores of an engine know of the engine."""
    secret_file = config.hicache_storage_secret_file
    pages = host_pool.tensor
    return StoreContext(
        namespace=namespace,
        page_bytes=pages.shape[1],
        host_memory=HostMemory(address=pages.data_ptr(), num_bytes=pages.nbytes, fd=host_pool.fd),
        advertised_host=advertised_host,
        secret_path=None if secret_file is None else Path(secret_file).expanduser(),
    )


def make_storage(
    config: StorageConfig, host_pool: HostPool, context: StoreContext, wakeup: Callable[[], None], clock: Clock
) -> StorageControl:
    """Return the storage control of an engine, without an attached store."""
    mover = StoreMover(host_pool, wakeup=wakeup, clock=clock, deadline_s=config.hicache_storage_deadline_s)
    wrap = partial(read_by_processes, most=config.hicache_storage_read_processes)
    return StorageControl(mover, config, context, wrap, wakeup=wakeup, clock=clock)


def _close_storage(storage: StorageControl, pool_closing: contextlib.ExitStack) -> None:
    if not storage.close():
        # A hung call may write into the pool until this process has ended, so the lock on the pool's folder is kept.
        logger.warning("a call of the store hangs: the host pool stays open until the process ends")
        pool_closing.pop_all()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reach:
    """The pool, and how other engines reach it."""

    pool: DevicePool
    host_id: str
    transports: tuple[PoolAddress, ...]


def _describe(
    config: EngineConfig,
    limits: SchedulerConfig,
    served: ServedModel,
    fingerprints: Fingerprints,
    reach: _Reach,
    epoch: EpochId,
    endpoint: str,
) -> EngineSpec:
    pool = reach.pool
    return EngineSpec(
        worker_id=WorkerId(config.worker_id or endpoint.removeprefix("tcp://")),
        epoch=epoch,
        role=config.endpoint.role,
        endpoint=endpoint,
        model_fingerprint=fingerprints.model,
        tokenizer_fingerprint=fingerprints.tokenizer,
        model_name=config.name.served_model_name or served.checkpoint.name,
        vocab_size=served.config.vocab_size,
        max_model_len=min(
            config.options.scheduler.context_length or served.config.max_position_embeddings,
            pool.num_pages * pool.layout.page_size,
        ),
        page_size=pool.layout.page_size,
        num_pages=pool.num_pages,
        namespace=namespace(fingerprints.model, pool.whole_layout),
        dtype=pool.layout.dtype,
        tp_size=config.options.runner.tp,
        max_running_requests=limits.max_running_requests,
        max_queued_requests=limits.max_queued_requests,
        scheduling_policy=limits.scheduling_policy,
        layout=pool.whole_layout.describe(),
        page_bytes=pool.whole_layout.page_bytes,
        host_id=reach.host_id,
        transports=reach.transports,
        writes_alone=True,
    )
