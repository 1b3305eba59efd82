"""Builds a model from a checkpoint: declares its tensors, checks that the checkpoint has them, then reads and packs
layer by layer on two threads.

Reading, dequantising and packing release the GIL, and a layer's plain weights are freed as soon as they are packed, so
the peak memory is the model plus two layers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch

from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.errors import ConfigError
from kvist.models.config import ModelConfig
from kvist.models.decoder import CausalLM, DeclaredModel
from kvist.models.families import FAMILIES
from kvist.models.parallel import TensorParallel
from kvist.models.weights import CheckpointSource, WeightReader, WeightSource, check_tensors

NUM_LOADING_THREADS = 2

logger = logging.getLogger(__name__)

LoadFormat = Literal["auto", "dummy"]  # auto: the weights of the checkpoint; dummy: random weights of the right shapes
Progress = Callable[[int, int], None]  # (tensors loaded, tensors in total), called on the caller's thread


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: torch.dtype,  # float32 or bfloat16
    device: torch.device,
    tp: TensorParallel,
    load_format: LoadFormat = "auto",
    seed: int = 0,  # of dummy weights
    progress: Progress | None = None,
) -> CausalLM:
    """Read this rank's part of the weights. Raises `ModelLoadError` that names the tensor, `ConfigError` for a TP
    size."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"dtype {dtype} is not supported; use float32 or bfloat16", param="dtype")
    declared = declare_model(config)
    declared.check_split(tp)  # before any read
    source: WeightSource
    if load_format == "dummy":
        from kvist.models.weights_dummy import DummySource

        source = DummySource(seed=seed, device=device)
    else:
        source = checkpoint_source = _open_source(checkpoint)
        check_tensors(checkpoint_source, declared.tensors, family=config.family, redundant=declared.redundant)
    reader = WeightReader(source, dtype=dtype, device=device, tp=tp)
    model = _build(declared, reader, progress or (lambda _done, _total: None))
    assert reader.num_bytes == declared.num_bytes_on(tp, dtype), "the memory plan counts what is read"
    logger.info("read %d tensors, %.2f GiB", reader.num_read, reader.num_bytes / 2**30)
    return model


def declare_model(config: ModelConfig) -> DeclaredModel:
    """Return the model before its weights are read: for the sizes and names of its tensors."""
    return FAMILIES[config.family].declare(config)


def _open_source(checkpoint: Checkpoint) -> CheckpointSource:
    if checkpoint.kind is CheckpointKind.GGUF:
        from kvist.models.weights_gguf import GgufSource

        return GgufSource(checkpoint)
    from kvist.models.weights_safetensors import SafetensorsSource

    return SafetensorsSource(checkpoint.path)


def _build(declared: DeclaredModel, reader: WeightReader, progress: Progress) -> CausalLM:
    num_tensors = len(declared.tensors)
    with _one_torch_thread(), ThreadPoolExecutor(NUM_LOADING_THREADS, thread_name_prefix="load") as pool:
        vocab = pool.submit(declared.vocab.load, reader)
        pending = [pool.submit(layer.load, reader) for layer in declared.layers]
        try:
            layers = []
            for layer in pending:
                layers.append(layer.result())
                progress(min(reader.num_read, num_tensors), num_tensors)
            model = CausalLM(declared.config, vocab.result(), layers)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    progress(num_tensors, num_tensors)
    return model


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Run each loading thread without OpenMP teams: teams on the same cores would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
