"""The differences between model families, as data. One decoder (decoder.py) serves all families.

No torch here: a gateway can read a model's configuration cheaply.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvist.errors import ModelLoadError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    name: str  # `model_type` in config.json, `general.architecture` in GGUF
    hf_architecture: str  # the entry of `architectures` for this family's text generator
    qkv_bias: bool | None = None  # None: config.json's `attention_bias` decides
    output_bias_with_qkv: bool = True  # o_proj has a bias wherever q, k and v have one
    qk_norm: bool = False  # RMSNorm over head_dim on q and k, before the rotation
    default_head_dim: int | None = None  # None: hidden_size // num_heads
    gguf_interleaves_rotation: bool = False  # GGUF stores q and k rows as rotation pairs (0, D/2, 1, D/2+1, ...)


FAMILIES = (
    # Llama 1 to 3.2, and the many models that share its shape (SmolLM2, TinyLlama, Yi, ...).
    Family(name="llama", hf_architecture="LlamaForCausalLM", gguf_interleaves_rotation=True),
    # Qwen2 and Qwen2.5: Llama with a bias on q, k and v.
    Family(name="qwen2", hf_architecture="Qwen2ForCausalLM", qkv_bias=True, output_bias_with_qkv=False),
    # Qwen3 (dense): q and k are normalised per head, and head_dim is independent of hidden_size / num_heads.
    Family(name="qwen3", hf_architecture="Qwen3ForCausalLM", qk_norm=True, default_head_dim=128),
)


def family_named(name: str, *, field: str, origin: str) -> Family:
    """Return the family `name`. Raises `ModelLoadError` that names the `field` of the file `origin`."""
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ModelLoadError(f"{origin}: {field} is {name!r}; supported model families: {known}")
