"""Resolves the options of a runner, once for each engine: device, dtype, attention backend, threads of each rank."""

from __future__ import annotations

import logging

import torch

from kvist.attention import choose_attention
from kvist.checkpoint import Checkpoint
from kvist.errors import ConfigError
from kvist.memory.device_pool import DTYPES
from kvist.models import ModelConfig
from kvist.models.load import declare_model
from kvist.models.parallel import TensorParallel
from kvist.runner.config import LOAD_FORMATS, RunnerConfig, RunnerLimits, RunnerOptions

logger = logging.getLogger(__name__)


def resolve_runner(
    options: RunnerOptions, limits: RunnerLimits, checkpoint: Checkpoint, model_config: ModelConfig
) -> RunnerConfig:
    """Return the runner's settings on this host. Raises `ConfigError` that names the flag to change."""
    device_name = _resolve_device(options)
    device = torch.device("cuda", options.base_gpu_id) if device_name == "cuda" else torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # libraries that allocate by themselves use this device, too
    dtype = ("float32" if device.type == "cpu" else "bfloat16") if options.dtype == "auto" else options.dtype
    _check_load_format(checkpoint, options.load_format)
    declare_model(model_config).check_split(TensorParallel(size=options.tp))
    attention = choose_attention(options.attention_backend, device, DTYPES[dtype], options.attention_options)
    logger.info("attention backend: %s (%s)", attention.name, attention.reason)
    return RunnerConfig(
        device=device_name,
        dtype=dtype,
        base_gpu_id=options.base_gpu_id,
        tp=options.tp,
        has_dummy_weights=options.load_format == "dummy",
        random_seed=options.random_seed,
        page_size=options.page_size,
        mem_fraction_static=options.mem_fraction_static,
        max_total_tokens=options.max_total_tokens,
        attention_backend=attention.name,
        attention_options=options.attention_options,
        uses_graphs=not options.disable_cuda_graph,
        num_threads=max(1, options.num_threads // options.tp) if options.num_threads else 0,
        limits=limits,
    )


def device_type(name: str) -> str:
    """Return "cpu" or "cuda" for `--device`."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def rank_device(config: RunnerConfig, rank: int) -> torch.device:
    return torch.device("cuda", config.base_gpu_id + rank) if config.device == "cuda" else torch.device(config.device)


def _resolve_device(options: RunnerOptions) -> str:
    name = device_type(options.device)
    if name != "cuda":
        if options.base_gpu_id and options.device == name:
            raise ConfigError(
                f"--base-gpu-id {options.base_gpu_id} needs a GPU, but --device is {name}: remove one of the two flags",
                param="base_gpu_id",
            )
        if options.base_gpu_id:  # `kvist up` may assign GPUs that the installed torch cannot use
            logger.warning("torch finds no GPU on this host: --base-gpu-id %d is ignored", options.base_gpu_id)
        return name
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU on this host; use --device cpu or auto", param="device")
    num_gpus, last = torch.cuda.device_count(), options.base_gpu_id + options.tp - 1
    if last >= num_gpus:
        param = "base_gpu_id" if options.tp == 1 else "tp"
        flags = f"--base-gpu-id {options.base_gpu_id}" + (f" --tp {options.tp}" if options.tp > 1 else "")
        raise ConfigError(
            f"{flags} needs GPU {last} (counted from 0), but torch finds {num_gpus} on this host", param=param
        )
    return name


def _check_load_format(checkpoint: Checkpoint, load_format: str) -> None:
    if load_format in LOAD_FORMATS and checkpoint.kind is not LOAD_FORMATS[load_format]:
        raise ConfigError(
            f"--load-format {load_format}: {checkpoint.path} is a {checkpoint.kind.value} checkpoint; use auto",
            param="load_format",
        )
