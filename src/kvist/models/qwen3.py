"""Qwen3 (dense): q and k are normalised per head, and head_dim is free of hidden_size / num_heads."""

from kvist.models.family import Family

FAMILY = Family(
    name="qwen3",
    hf_architecture="Qwen3ForCausalLM",
    qkv_bias=None,
    output_bias_with_qkv=True,
    qk_norm=True,
    default_head_dim=128,
    gguf_interleaves_rotation=False,
)
