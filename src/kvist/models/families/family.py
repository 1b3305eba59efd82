"""The interface of a model family.

A family's file has the family's names, reads its configuration and refuses what is not supported, and composes its
layers. Names and configuration need no torch, so `load_model_config` imports none; `declare` imports the layers itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kvist.models.config import ModelConfig
from kvist.models.config_gguf import GgufConfig
from kvist.models.config_hf import HfConfig

if TYPE_CHECKING:
    from kvist.models.decoder import DeclaredModel


class Family(Protocol):
    hf_model_type: str  # `model_type` in config.json
    hf_architecture: str  # the entry of `architectures` for this family's text generator
    gguf_architecture: str  # `general.architecture`

    def config_from_hf(self, hf: HfConfig) -> ModelConfig:
        """Read config.json. Raises `ModelLoadError` that names a field whose value is not supported."""

    def config_from_gguf(self, gguf: GgufConfig) -> ModelConfig:
        """Read a GGUF header. Raises `ModelLoadError` that names a field whose value is not supported."""

    def declare(self, config: ModelConfig) -> DeclaredModel:
        """Compose the model of layers that are not loaded yet."""
