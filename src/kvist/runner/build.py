"""From a checkpoint to a `Runner`: device, dtype, page pool, weights, follower ranks, in that order.

The pool comes before the weights, because its size follows from the configuration alone: a pool that does not fit is
refused in milliseconds. On a CPU all tensor-parallel ranks map one pool file of whole pages and each works on its own
heads, so a page is the same for every TP size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kvist.attention import build_attention, choose_attention
from kvist.attention.backend import AttentionBackend
from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.errors import ConfigError
from kvist.kv.device import DTYPES, DevicePool, PoolSize, available_memory_bytes, default_runtime_dir, plan_pool_size
from kvist.kv.layout import PageLayout
from kvist.models import ModelConfig, load_model
from kvist.models.decoder import CausalLM
from kvist.models.parallel import TensorParallel
from kvist.models.weights import expected_tensors
from kvist.runner.graph_sizes import graphs_bytes
from kvist.runner.runner import AnyRunner, Runner
from kvist.runner.tp import FollowerProcesses, RankSpec, join

CPU_CAP_TOKENS = 65_536  # a laptop's memory would hold absurdly many; --max-total-tokens overrides it
LoadProgress = Callable[[int, int], None]  # (tensors loaded, tensors in all)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """The worker's settings that the runner needs; what is still "auto" is resolved here, once."""

    dtype: str = "auto"  # float32 on a CPU, bfloat16 on a GPU
    device: str = "auto"
    base_gpu_id: int = 0  # rank 0's GPU; rank n has the n-th after it
    load_format: str = "auto"
    attention_backend: str = "auto"
    tp: int = 1
    mem_fraction_static: float = 0.8
    max_total_tokens: int | None = None
    min_total_tokens: int = 1  # refuse to start with a smaller pool
    page_size: int = 16
    num_threads: int = 0  # of the whole engine, shared by its ranks; 0: torch's own choice
    random_seed: int = 0  # of dummy weights
    max_running_requests: int = 128  # what GPU buffers and graphs are made for
    max_batch_tokens: int = 1024
    context_length: int | None = None  # None: the model's
    use_graphs: bool = True


def build_runner(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    config: RunnerConfig,
    *,
    runtime_dir: Path | None = None,
    progress: LoadProgress | None = None,
) -> AnyRunner:
    """Raises `ConfigError` (or its `ModelLoadError`) for what does not fit together, saying which flag to change."""
    device = _resolve_device(config)
    runtime_dir = runtime_dir or default_runtime_dir()
    dtype = ("float32" if device.type == "cpu" else "bfloat16") if config.dtype == "auto" else config.dtype
    _check_load_format(checkpoint, config.load_format)
    layout = PageLayout(
        num_kv_heads=model_config.num_kv_heads,
        num_layers=model_config.num_layers,
        page_size=config.page_size,
        head_dim=model_config.head_dim,
        dtype=dtype,
    )
    size = _pool_size(model_config, layout, config, device, runtime_dir)
    pool = DevicePool.create(layout, size.num_pages, device=device, directory=runtime_dir)
    spec = RankSpec(
        checkpoint_path=str(checkpoint.path),
        checkpoint_kind=checkpoint.kind,
        dtype=dtype,
        device=str(device),
        load_format="dummy" if config.load_format == "dummy" else "auto",
        attention_backend=choose_attention(config.attention_backend, device, DTYPES[dtype]).name,
        page_size=config.page_size,
        random_seed=config.random_seed,
        num_threads=max(1, config.num_threads // config.tp) if config.num_threads else 0,
        size=config.tp,
        pool=pool.address if config.tp > 1 else None,
        rendezvous=str(runtime_dir),
    )
    followers: FollowerProcesses | None = None
    try:
        if config.tp > 1:
            spec, followers = FollowerProcesses.start(spec)
        model, attention = build_rank(checkpoint, model_config, spec, pool, progress)
    except BaseException:
        if followers is not None:
            followers.close()
        pool.close()
        raise
    if device.type == "cuda":
        return _on_gpu(model, pool, attention, config, size.reason)
    return Runner(model=model, pool=pool, attention=attention, pool_reason=size.reason, followers=followers)


def _on_gpu(
    model: CausalLM, pool: DevicePool, attention: AttentionBackend, config: RunnerConfig, pool_reason: str
) -> AnyRunner:
    from kvist.runner.cuda_runner import CudaRunner, StepLimits

    torch.cuda.empty_cache()  # what loading left behind
    context_len = min(config.context_length or model.config.max_position_embeddings, pool.num_pages * config.page_size)
    limits = StepLimits(
        max_requests=config.max_running_requests,
        max_tokens=config.max_batch_tokens,
        max_pages=-(-context_len // config.page_size),
    )
    try:
        return CudaRunner(
            model=model,
            pool=pool,
            attention=attention,
            limits=limits,
            use_graphs=config.use_graphs,
            pool_reason=pool_reason,
        )
    except BaseException:
        pool.close()
        raise


def build_rank(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    spec: RankSpec,
    pool: DevicePool,
    progress: LoadProgress | None = None,
) -> tuple[CausalLM, AttentionBackend]:
    """One rank's model, and its attention bound to its heads of the pool. With more ranks a collective."""
    if spec.num_threads:
        torch.set_num_threads(spec.num_threads)
    device = torch.device(spec.device)
    tp = join(spec) if spec.size > 1 else TensorParallel()
    model = load_model(
        checkpoint,
        model_config,
        dtype=DTYPES[spec.dtype],
        device=device,
        tp=tp,
        load_format="dummy" if spec.load_format == "dummy" else "auto",
        seed=spec.random_seed,
        progress=progress,
    )
    attention = build_attention(spec.attention_backend, device)
    attention.bind(pool.tensor[:, tp.kv_heads(model_config.num_kv_heads)])
    return model, attention


def device_type(name: str) -> str:
    """ "cpu" or "cuda", for `--device`."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _resolve_device(config: RunnerConfig) -> torch.device:
    name = device_type(config.device)
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu or auto", param="device")
    if name != "cuda":
        return torch.device(name)
    if config.tp > 1:
        raise ConfigError(
            f"--tp {config.tp} on GPUs comes with the GPU engine: use --tp 1, or --device cpu", param="tp"
        )
    if config.base_gpu_id >= torch.cuda.device_count():
        raise ConfigError(
            f"--base-gpu-id {config.base_gpu_id}: torch sees {torch.cuda.device_count()} GPUs here, counted from 0",
            param="base_gpu_id",
        )
    torch.cuda.set_device(config.base_gpu_id)  # what libraries allocate by themselves goes there, too
    return torch.device("cuda", config.base_gpu_id)


def _check_load_format(checkpoint: Checkpoint, load_format: str) -> None:
    kinds = {"safetensors": CheckpointKind.HF, "gguf": CheckpointKind.GGUF}
    if load_format in kinds and checkpoint.kind is not kinds[load_format]:
        raise ConfigError(
            f"--load-format {load_format}: {checkpoint.path} is a {checkpoint.kind.value} checkpoint; use auto",
            param="load_format",
        )


def _pool_size(
    model_config: ModelConfig, layout: PageLayout, config: RunnerConfig, device: torch.device, runtime_dir: Path
) -> PoolSize:
    runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    num_weights = sum(math.prod(shape) for shape in expected_tensors(model_config).values())
    free_bytes = available_memory_bytes(device, runtime_dir)
    return plan_pool_size(
        layout,
        available_bytes=torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else free_bytes,
        free_bytes=free_bytes,
        weights_bytes=num_weights * DTYPES[layout.dtype].itemsize,
        reserve_bytes=_graphs_bytes(config) if device.type == "cuda" and config.use_graphs else 0,
        mem_fraction_static=config.mem_fraction_static,
        max_total_tokens=config.max_total_tokens,
        cap_tokens=CPU_CAP_TOKENS if device.type == "cpu" else None,
        min_tokens=config.min_total_tokens,
    )


def _graphs_bytes(config: RunnerConfig) -> int:
    return graphs_bytes(config.max_running_requests, config.max_batch_tokens)
