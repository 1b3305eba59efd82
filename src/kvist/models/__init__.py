"""Models: what they are (`load_model_config`) and their forward pass (`load_model`).

`load_model_config` costs no torch import, so a gateway may call it; `load_model` imports torch when it is called.
A model knows nothing of pages: it hands q, k and v of each layer to the `attend` it is given (decoder.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.models.config import ModelConfig
from kvist.models.config_gguf import config_from_gguf
from kvist.models.config_hf import config_from_hf

if TYPE_CHECKING:
    import torch

    from kvist.models.decoder import CausalLM
    from kvist.models.load import LoadFormat, Progress
    from kvist.models.parallel import TensorParallel

__all__ = ["ModelConfig", "load_model", "load_model_config"]


def load_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Raises `ModelLoadError` naming the file and the field that is missing, wrong or not supported."""
    if checkpoint.kind is CheckpointKind.GGUF:
        return config_from_gguf(checkpoint.path)
    return config_from_hf(checkpoint)


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
    """Read this rank's share of the weights. Raises `ModelLoadError` naming the tensor, `ConfigError` for a TP size."""
    from kvist.models.load import LoadOptions, load_weights

    options = LoadOptions(dtype=dtype, device=device, tp=tp, load_format=load_format, seed=seed)
    return load_weights(checkpoint, config, options, progress or (lambda _done, _total: None))
