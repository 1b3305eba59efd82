"""The supported model families: one file and one entry in `FAMILIES` each (family.py has their interface)."""

from __future__ import annotations

from kvist.errors import ModelLoadError
from kvist.models.families.family import Family
from kvist.models.families.llama import Llama
from kvist.models.families.qwen2 import Qwen2
from kvist.models.families.qwen3 import Qwen3

__all__ = ["FAMILIES", "Family", "family_of_architecture", "family_of_model_type"]

FAMILIES: dict[str, Family] = {  # by `ModelConfig.family`
    "llama": Llama(),
    "qwen2": Qwen2(),
    "qwen3": Qwen3(),
}


def family_of_model_type(model_type: str, *, origin: str) -> str:
    """Return the key of the family with this `model_type` in config.json. Raises `ModelLoadError`."""
    return _find({family.hf_model_type: name for name, family in FAMILIES.items()}, model_type, f"{origin}: model_type")


def family_of_architecture(architecture: str, *, origin: str) -> str:
    """Return the key of the family with this `general.architecture` in GGUF. Raises `ModelLoadError`."""
    architectures = {family.gguf_architecture: name for name, family in FAMILIES.items()}
    return _find(architectures, architecture, f"{origin}: general.architecture")


def _find(names: dict[str, str], name: str, field: str) -> str:
    if name not in names:
        raise ModelLoadError(f"{field} is {name!r}; supported model families: {', '.join(sorted(names))}")
    return names[name]
