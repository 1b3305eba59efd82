"""Builds one engine from its settings: model, pages, scheduler, sockets, transport, loop; and takes it apart again.

The role changes one thing only, the scheduler (scheduler/unified.py, prefill.py, decode.py): the loop and everything
around it are the same. What is made here is closed here, in the opposite order: first the transport (nothing is
written any more), then sockets, runner and pool, and last the epoch's lock, which tells the peers that it is over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kvist.attention import build_attention
from kvist.channel import EngineChannel
from kvist.checkpoint import Checkpoint, CheckpointKind, find_checkpoint, fingerprint
from kvist.clock import MonotonicClock
from kvist.errors import ConfigError
from kvist.kv.cache import PageCache
from kvist.kv.device import DevicePool, available_memory_bytes, default_runtime_dir, plan_pool_size
from kvist.kv.layout import PageLayout, namespace
from kvist.models import ModelConfig, load_model, load_model_config
from kvist.models.decoder import CausalLM
from kvist.models.parallel import TensorParallel
from kvist.models.weights import expected_tensors
from kvist.request import EpochId, RequestId, SamplingParams, WorkerId
from kvist.runner.runner import Runner
from kvist.scheduler import build_scheduler
from kvist.scheduler.plan import Batch, BatchItem
from kvist.transfer import Transport
from kvist.transfer.epoch import EpochLock, new_epoch, num_live_epochs, sweep
from kvist.transfer.jobs import LocalPool
from kvist.transfer.none import NONE, NoTransport
from kvist.transfer.shm import ShmTransport
from kvist.wire import EngineSpec, PoolAddress
from kvist.worker.config import UNIFIED, EngineConfig
from kvist.worker.loop import EngineLoop, LoopParts
from kvist.worker.reports import LoadReports

CPU_POOL_TOKENS = 65536  # the pool's default limit on a CPU, where memory alone would give absurdly many

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    spec: EngineSpec
    loop: EngineLoop
    closing: contextlib.ExitStack

    def close(self) -> None:
        """After the loop has ended."""
        self.closing.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """A model in memory, and what is known of it."""

    checkpoint: Checkpoint
    config: ModelConfig
    model: CausalLM
    dtype: str
    device: torch.device
    weights_bytes: int
    available_bytes: int  # before the weights were read
    fingerprint: str


def build_engine(config: EngineConfig, *, progress: Callable[[str], None]) -> Engine:
    """Ready to serve when it returns. Raises `ConfigError` or `ModelLoadError`, and leaves nothing behind then."""
    with contextlib.ExitStack() as closing:
        runtime_dir = prepare_runtime_dir(config.runtime_dir)
        sweep(runtime_dir)
        epoch = new_epoch()
        closing.callback(EpochLock(runtime_dir, epoch).close)
        torch.set_num_threads(config.num_threads or _share_of_cores(runtime_dir))
        loaded = _load(config, runtime_dir, progress)
        runner = _make_runner(config, loaded, runtime_dir, closing)
        _warm_up(runner, progress)
        return _assemble(config, loaded, runner, epoch, runtime_dir, closing.pop_all())


def prepare_runtime_dir(runtime_dir: str | None) -> Path:
    """The folder that all engines of this user on this host share. Raises `ConfigError` if it cannot be trusted."""
    if runtime_dir is None:
        return default_runtime_dir().resolve()
    path = Path(runtime_dir).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = path.stat().st_uid
    except OSError as error:
        raise ConfigError(f"--runtime-dir {path} cannot be used: {error}", param="runtime_dir") from error
    if hasattr(os, "getuid") and owner != os.getuid():
        # Whoever owns the folder can put files there that we would map and trust.
        message = f"--runtime-dir {path} belongs to another user: name a folder of your own"
        raise ConfigError(message, param="runtime_dir")
    return path.resolve()


def _share_of_cores(runtime_dir: Path) -> int:
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // num_live_epochs(runtime_dir))


# ---------------------------------------------------------------- model and pages


def _load(config: EngineConfig, runtime_dir: Path, progress: Callable[[str], None]) -> _Loaded:
    checkpoint = find_checkpoint(config.model_path)
    _check_load_format(config.load_format, checkpoint)
    model_config = load_model_config(checkpoint)
    _check_context_length(config.context_length, model_config)
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = config.dtype if config.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
    available_bytes = available_memory_bytes(device, runtime_dir)
    num_elements = sum(math.prod(shape) for shape in expected_tensors(model_config).values())
    dummy = config.load_format == "dummy"
    last_tenth = -1

    def on_tensor(num_done: int, num_tensors: int) -> None:
        nonlocal last_tenth
        if (tenth := 10 * num_done // num_tensors) > last_tenth:
            last_tenth = tenth
            progress(f"loading weights {10 * tenth}%")

    model = load_model(
        checkpoint,
        model_config,
        dtype=getattr(torch, dtype),
        device=device,
        tp=TensorParallel(),
        load_format="dummy" if dummy else "auto",
        seed=config.random_seed,
        progress=on_tensor,
    )
    return _Loaded(
        checkpoint=checkpoint,
        config=model_config,
        model=model,
        dtype=dtype,
        device=device,
        weights_bytes=num_elements * getattr(torch, dtype).itemsize,
        available_bytes=available_bytes,
        # dummy weights of another seed make other pages of the same checkpoint
        fingerprint=fingerprint(checkpoint) + (f"-dummy-{config.random_seed}" if dummy else ""),
    )


def _check_load_format(load_format: str, checkpoint: Checkpoint) -> None:
    wanted = {"safetensors": CheckpointKind.HF, "gguf": CheckpointKind.GGUF}.get(load_format)
    if wanted is not None and wanted is not checkpoint.kind:
        raise ConfigError(
            f"--load-format {load_format}: {checkpoint.path} is a {checkpoint.kind.value} checkpoint; use auto",
            param="load_format",
        )


def _check_context_length(context_length: int | None, model_config: ModelConfig) -> None:
    trained_for = model_config.max_position_embeddings
    if context_length is not None and context_length > trained_for:
        raise ConfigError(
            f"--context-length {context_length} is more than the {trained_for} tokens that the model was trained for",
            param="context_length",
        )


def _make_runner(config: EngineConfig, loaded: _Loaded, runtime_dir: Path, closing: contextlib.ExitStack) -> Runner:
    layout = PageLayout(
        num_kv_heads=loaded.config.num_kv_heads,
        num_layers=loaded.config.num_layers,
        page_size=config.page_size,
        head_dim=loaded.config.head_dim,
        dtype=loaded.dtype,
    )
    size = plan_pool_size(
        layout,
        available_bytes=loaded.available_bytes,
        weights_bytes=loaded.weights_bytes,
        mem_fraction_static=config.mem_fraction_static,
        max_total_tokens=config.max_total_tokens,
        cap_tokens=CPU_POOL_TOKENS if loaded.device.type == "cpu" else None,
        min_tokens=config.context_length or 2 * config.page_size,
    )
    log.info("page pool: %s", size.reason)
    pool = DevicePool.create(layout, size.num_pages, device=loaded.device, directory=runtime_dir)
    attention = build_attention(config.attention_backend, loaded.device)
    attention.bind(pool.tensor)
    runner = Runner(model=loaded.model, pool=pool, attention=attention)
    closing.callback(runner.close)
    return runner


def _warm_up(runner: Runner, progress: Callable[[str], None]) -> None:
    """One chunk and one decode, so that the first request does not pay for what torch makes on first use. They write
    to page 0, which nobody has been given yet."""
    progress("warming up")
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    for start, num_tokens in ((0, runner.pool.layout.page_size - 1), (runner.pool.layout.page_size - 1, 1)):
        if num_tokens:
            item = BatchItem(
                request_id=RequestId("warm-up"),
                token_ids=(0,) * num_tokens,
                start=start,
                page_ids=(0,),
                sampling=sampling,
            )
            runner.execute(Batch(step_id=0, items=(item,)))


# ---------------------------------------------------------------- everything around them


def _assemble(
    config: EngineConfig,
    loaded: _Loaded,
    runner: Runner,
    epoch: EpochId,
    runtime_dir: Path,
    closing: contextlib.ExitStack,
) -> Engine:
    with closing:  # unless all goes well
        pool = runner.pool
        channel = EngineChannel(
            f"tcp://{_bracketed(config.engine_host)}:{config.engine_port or '*'}",
            epoch=epoch,
            config=config.channel,
            advertise_host=config.engine_advertise_host,
        )
        closing.callback(channel.close)
        address, transport = _make_transport(config, pool, runtime_dir, channel.wakeup)
        closing.callback(transport.close)
        spec = _describe(config, loaded, pool, epoch, channel.endpoint)
        scheduler_config = dataclasses.replace(
            config.scheduler,
            max_model_len=spec.max_model_len,
            eos_token_ids=config.scheduler.eos_token_ids or loaded.config.eos_token_ids,
        )
        cache = PageCache(num_pages=pool.num_pages, page_size=config.page_size, namespace=spec.namespace)
        parts = LoopParts(
            spec=spec,
            scheduler=build_scheduler(config.role, scheduler_config, cache, epoch, address),
            runner=runner,
            channel=channel,
            transport=transport,
            reports=LoadReports(cached_digests=cache.digests),
            clock=MonotonicClock(),
            gateway_timeout_s=config.gateway_timeout_s,
        )
        return Engine(spec=spec, loop=EngineLoop(parts), closing=closing.pop_all())


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _make_transport(
    config: EngineConfig, pool: DevicePool, runtime_dir: Path, wakeup: Callable[[], None]
) -> tuple[PoolAddress, Transport]:
    if pool.tensor.device.type == "cpu" or config.role != UNIFIED:
        address = pool.address  # raises for a GPU's pool: no transport reaches it yet
        local = LocalPool(pages=pool.bytes, address=address)
        return address, ShmTransport(local=local, runtime_dir=runtime_dir, wakeup=wakeup)
    reason = f"this engine's pages are on {pool.tensor.device} and cannot be handed over yet"
    address = PoolAddress(
        transport=NONE,
        location="",
        num_pages=pool.num_pages,
        page_bytes=pool.layout.page_bytes,
        layout=pool.layout.describe(),
    )
    return address, NoTransport(reason=reason, runtime_dir=runtime_dir, wakeup=wakeup)


def _describe(config: EngineConfig, loaded: _Loaded, pool: DevicePool, epoch: EpochId, endpoint: str) -> EngineSpec:
    return EngineSpec(
        worker_id=WorkerId(config.worker_id or endpoint.removeprefix("tcp://")),
        epoch=epoch,
        role=config.role,
        endpoint=endpoint,
        model_fingerprint=loaded.fingerprint,
        model_name=config.served_model_name or loaded.checkpoint.name,
        vocab_size=loaded.config.vocab_size,
        max_model_len=min(
            config.context_length or loaded.config.max_position_embeddings, pool.num_pages * config.page_size
        ),
        page_size=config.page_size,
        num_pages=pool.num_pages,
        namespace=namespace(loaded.fingerprint, pool.layout),
        dtype=loaded.dtype,
        tp_size=config.tp,
        max_running_requests=config.scheduler.max_running_requests,
        max_queued_requests=config.scheduler.max_queued_requests,
    )
