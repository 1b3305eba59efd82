"""Models: what they are (`load_model_config`) and their forward pass (load.py's `load_model`).

`load_model_config` costs no torch import, so a gateway may call it.
A model knows nothing of pages: it hands q, k and v of each layer to the `attend` it is given (decoder.py).
"""

from __future__ import annotations

from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.models.config import ModelConfig
from kvist.models.config_gguf import config_from_gguf
from kvist.models.config_hf import config_from_hf

__all__ = ["ModelConfig", "load_model_config"]


def load_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Raises `ModelLoadError` naming the file and the field that is missing, wrong or not supported."""
    if checkpoint.kind is CheckpointKind.GGUF:
        return config_from_gguf(checkpoint.path)
    return config_from_hf(checkpoint)
