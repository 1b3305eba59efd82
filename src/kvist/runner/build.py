"""Builds a runner from a checkpoint: device, dtype, page pool, follower ranks, weights, in that order.

The pool is made before the weights are loaded, because its size depends on the configuration alone: a pool that does
not fit is refused in milliseconds. On a CPU all tensor-parallel ranks map one pool file of whole pages, and each works
on its own heads, so a page is the same for every TP size. On GPUs each rank has its own pool: the page ids are the same
on all ranks, and a page has the rank's own heads, which are one contiguous piece of the whole page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import torch

from kvist.attention import attention_kind, build_attention
from kvist.attention.backend import AttentionBackend, AttentionSizes, Captures
from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.errors import ConfigError
from kvist.grammar.compiler import GrammarCompiler
from kvist.kernels.shaping import TableSizes
from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DTYPES, DevicePool, PoolSize, RankPool, Room, plan_pool_size
from kvist.memory.host_memory import available_host_bytes
from kvist.memory.runtime_dir import allocation_lock, free_bytes
from kvist.memory.runtime_dir import runtime_dir as user_runtime_dir
from kvist.models import ModelConfig
from kvist.models.decoder import CausalLM
from kvist.models.load import declare_model, load_model
from kvist.models.parallel import TensorParallel
from kvist.runner.config import RunnerConfig, RunnerLimits, RunnerOptions
from kvist.runner.graph_sizes import decode_sizes, graphs_bytes
from kvist.runner.leader import LeadingRunner
from kvist.runner.resolve import rank_device, resolve_runner
from kvist.runner.runner import AnyRunner, RankRunner, Runner
from kvist.runner.shaping import table_sizes
from kvist.runner.slots import SlotTable
from kvist.runner.tp import FollowerProcesses, Rendezvous, new_rendezvous_path
from kvist.wire import PoolAddress

COLLECTIVES_BYTES = 512 << 20  # NCCL's buffers on a GPU, approximately
# Limits of a CPU's pool, unless --max-total-tokens is given: the whole pool is allocated when the engine starts, and
# the free memory of a laptop is enough for far more tokens than are useful.
CPU_CAP_TOKENS, CPU_CAP_SHARE = 32_768, 1 / 8
DEFAULT_LIMITS = RunnerLimits()

BuildProgress = Callable[[str, int, int], None]
"""Gets (stage, number done, number of all): "loading weights", in tensors, and "capturing CUDA graphs"."""


class RankSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `build_rank` needs; equal on all ranks except `rank`."""

    config: RunnerConfig
    checkpoint_path: str
    checkpoint_kind: CheckpointKind
    num_pages: int
    pool: PoolAddress | None  # the pool that all ranks share, on a CPU; None: each rank has its own
    rendezvous: str  # path of the file through which the ranks synchronise
    rank: int = 0
    grammar_backend: str = "llguidance"

    @property
    def device(self) -> torch.device:
        return rank_device(self.config, self.rank)


def build_runner(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    options: RunnerOptions,
    limits: RunnerLimits = DEFAULT_LIMITS,
    *,
    runtime_dir: Path | None = None,
    progress: BuildProgress | None = None,
    grammars: GrammarCompiler | None = None,
    grammar_backend: str = "llguidance",
) -> AnyRunner:
    """Build the runner and start its followers. `grammars` compiles the constraints of requests at rank 0; a follower
    has its own compiler, with the backend `grammar_backend`. Raises `ConfigError` (or its subclass `ModelLoadError`)
    that names the flag to change."""
    config = resolve_runner(options, limits, checkpoint, model_config)
    device = rank_device(config, 0)
    runtime_dir = user_runtime_dir(None if runtime_dir is None else str(runtime_dir))
    layout = page_layout(model_config, config)
    with allocation_lock(runtime_dir):  # no other engine may allocate the free memory meanwhile
        size = _pool_size(model_config, layout, config, device, runtime_dir)
        pool = DevicePool.create(layout, size.num_pages, device=device, directory=runtime_dir)
    spec = RankSpec(
        config=config,
        checkpoint_path=str(checkpoint.path),
        checkpoint_kind=checkpoint.kind,
        num_pages=size.num_pages,
        pool=pool.address if config.tp > 1 and device.type == "cpu" else None,
        rendezvous=str(new_rendezvous_path(runtime_dir)),
        grammar_backend=grammar_backend,
    )
    followers: FollowerProcesses | None = None
    rendezvous: Rendezvous | None = None
    try:
        if config.tp > 1:
            specs = [msgspec.msgpack.encode(msgspec.structs.replace(spec, rank=rank)) for rank in range(1, config.tp)]
            followers = FollowerProcesses(Path(spec.rendezvous))
            followers.start(specs)
            rendezvous = Rendezvous(spec.rendezvous, rank=0, size=config.tp, check=followers.check_alive)
        runner = build_rank(
            checkpoint, model_config, spec, pool, rendezvous, progress, pool_reason=size.reason, grammars=grammars
        )
    except BaseException as error:
        if followers is not None:
            followers.close(kill=True)
        pool.close()
        if isinstance(error, torch.OutOfMemoryError):
            raise ConfigError(
                f"not enough memory on {device} beside the page pool: {error}; lower --mem-fraction-static or "
                "--max-running-requests",
                param="mem_fraction_static",
            ) from error
        raise
    return runner if followers is None else LeadingRunner(runner, followers)


def build_rank(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    spec: RankSpec,
    pool: DevicePool,
    rendezvous: Rendezvous | None,
    progress: BuildProgress | None = None,
    pool_reason: str = "",
    grammars: GrammarCompiler | None = None,
) -> RankRunner:
    """Build the runner of one rank. With a `rendezvous` this is a collective: all ranks must call it."""
    config, device = spec.config, spec.device
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    # before the weights: a backend that cannot run here fails before minutes of loading
    attention = build_attention(config.attention_backend, device, config.attention_options)
    tp = TensorParallel() if rendezvous is None else rendezvous.join(device)
    model = load_model(
        checkpoint,
        model_config,
        dtype=DTYPES[config.dtype],
        device=device,
        tp=tp,
        load_format="dummy" if config.has_dummy_weights else "auto",
        seed=config.random_seed,
        progress=None if progress is None else partial(progress, "loading weights"),
    )
    holds_all_heads = pool.layout.num_kv_heads == model_config.num_kv_heads
    attention.bind(pool.tensor[:, tp.kv_heads(model_config.num_kv_heads)] if holds_all_heads else pool.tensor)
    if rendezvous is not None:
        rendezvous.put("pool", pool.address.location)
        rendezvous.barrier("loaded")
    table = SlotTable(slot_table_sizes(model_config, config), device, grammars)
    if device.type != "cuda":
        return Runner(
            model=model,
            pool=pool,
            attention=attention,
            table=table,
            pool_reason=pool_reason,
        )
    if rendezvous is not None and spec.rank == 0:
        others = [_pool_of(rank, rendezvous, model_config, config) for rank in range(1, config.tp)]
        pool.join_ranks(model_config.num_kv_heads, others)
    return _on_gpu(model, pool, attention, table, config, pool_reason, progress)


def slot_table_sizes(model_config: ModelConfig, config: RunnerConfig) -> TableSizes:
    return table_sizes(
        config.limits.max_running_requests,
        vocab_size=model_config.vocab_size,
        context_len=_context_len(model_config, config),
    )


def _context_len(model_config: ModelConfig, config: RunnerConfig) -> int:
    return config.limits.context_length or model_config.max_position_embeddings


def _pool_of(rank: int, rendezvous: Rendezvous, model_config: ModelConfig, config: RunnerConfig) -> RankPool:
    heads = TensorParallel(rank=rank, size=config.tp).kv_heads(model_config.num_kv_heads)
    return RankPool(path=rendezvous.get("pool", rank), device=rank_device(config, rank), first_head=heads.start)


def _on_gpu(
    model: CausalLM,
    pool: DevicePool,
    attention: AttentionBackend,
    table: SlotTable,
    config: RunnerConfig,
    pool_reason: str,
    progress: BuildProgress | None,
) -> RankRunner:
    from kvist.runner.cuda_runner import CudaRunner, StepLimits

    torch.cuda.empty_cache()  # temporary buffers of the loading
    context_len = min(_context_len(model.config, config), pool.num_pages * config.page_size)
    limits = StepLimits(
        max_requests=config.limits.max_running_requests,
        max_tokens=config.limits.max_batch_tokens,
        max_pages=-(-context_len // config.page_size),
    )
    return CudaRunner(
        model=model,
        pool=pool,
        attention=attention,
        limits=limits,
        table=table,
        use_graphs=config.uses_graphs,
        pool_reason=pool_reason,
        on_captured=None if progress is None else partial(progress, "capturing CUDA graphs"),
    )


def page_layout(model_config: ModelConfig, config: RunnerConfig) -> PageLayout:
    """Return the layout of a rank's pool: whole pages shared by all ranks on a CPU, the rank's own heads on GPUs."""
    heads = slice(0, model_config.num_kv_heads)
    if config.device == "cuda":
        heads = TensorParallel(size=config.tp).kv_heads(model_config.num_kv_heads)  # every rank has the same number
    return PageLayout(
        num_kv_heads=heads.stop - heads.start,
        num_layers=model_config.num_layers,
        page_size=config.page_size,
        head_dim=model_config.head_dim,
        dtype=config.dtype,
    )


def weights_bytes(model_config: ModelConfig, config: RunnerConfig) -> int:
    """Return the size of the weights on one device: of rank 0 on its GPU, of all ranks on a CPU."""
    model, dtype = declare_model(model_config), DTYPES[config.dtype]
    num_ranks_there = 1 if config.device == "cuda" else config.tp
    ranks = [TensorParallel(rank=rank, size=config.tp) for rank in range(num_ranks_there)]
    return sum(model.num_bytes_on(tp, dtype) for tp in ranks)


def gpu_reserve_bytes(model_config: ModelConfig, config: RunnerConfig, num_sms: int) -> int:
    """Return the device memory that a rank needs for graphs, buffers and collectives, all made after the pool."""
    num_bytes = COLLECTIVES_BYTES if config.tp > 1 else 0
    num_rows = config.limits.max_running_requests
    num_bytes += slot_table_sizes(model_config, config).num_bytes
    kind = attention_kind(config.attention_backend, config.attention_options)
    captures = kind.captures if config.uses_graphs else Captures.NOTHING
    if captures is not Captures.NOTHING:
        max_mixed_tokens = config.limits.max_batch_tokens if captures is Captures.ALL else 0
        num_bytes += graphs_bytes(num_rows, max_mixed_tokens, model_config.vocab_size)
    sizes = AttentionSizes(
        num_q_heads=model_config.num_heads // config.tp,
        num_kv_heads=page_layout(model_config, config).num_kv_heads,
        head_dim=model_config.head_dim,
        num_sms=num_sms,
        decode_graph_sizes=() if captures is Captures.NOTHING else decode_sizes(num_rows),
    )
    return num_bytes + kind.reserve_bytes(sizes)


def _num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _pool_size(
    model_config: ModelConfig, layout: PageLayout, config: RunnerConfig, device: torch.device, runtime_dir: Path
) -> PoolSize:
    """Plan the pool for rank 0; all ranks use its size. The GPUs of one engine are alike, and a rank whose GPU has less
    free memory fails when it starts."""
    on_gpu = device.type == "cuda"
    free, total = torch.cuda.mem_get_info(device) if on_gpu else (available_host_bytes(), 0)
    context_length = config.limits.context_length
    context_tokens = context_length or model_config.max_position_embeddings
    share_tokens = int(free * CPU_CAP_SHARE) // layout.page_bytes * layout.page_size
    cap_tokens = max(min(CPU_CAP_TOKENS, max(share_tokens, context_tokens)), context_length or 0)
    room = Room(free_bytes=free_bytes(runtime_dir), directory=runtime_dir, enough_tokens=context_tokens)
    size = plan_pool_size(
        layout,
        available_bytes=total if on_gpu else free,
        free_bytes=free,
        weights_bytes=weights_bytes(model_config, config),
        reserve_bytes=gpu_reserve_bytes(model_config, config, _num_sms(device)) if on_gpu else 0,
        mem_fraction_static=config.mem_fraction_static,
        max_total_tokens=config.max_total_tokens,
        cap_tokens=None if on_gpu else cap_tokens,
        min_tokens=context_length or 2 * config.page_size,
        room=None if on_gpu else room,
    )
    if on_gpu and config.tp > 1:
        return replace(size, reason=f"{size.reason}; on each of {config.tp} GPUs")
    return size
