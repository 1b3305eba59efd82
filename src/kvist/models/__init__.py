"""Models: their configuration (`load_model_config`) and their forward pass (`load_model` in load.py).

`load_model_config` imports no torch, so a gateway may call it.
A model has no pages: it passes q, k and v of each layer to the `attend` of the caller (decoder.py).
"""

from __future__ import annotations

from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.models.config import ModelConfig
from kvist.models.config_gguf import config_from_gguf
from kvist.models.config_hf import config_from_hf

__all__ = ["ModelConfig", "load_model_config"]


def load_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Read the configuration of a checkpoint. Raises `ModelLoadError` that names the file and the field that is
    missing, wrong or not supported."""
    if checkpoint.kind is CheckpointKind.GGUF:
        return config_from_gguf(checkpoint)
    return config_from_hf(checkpoint)
