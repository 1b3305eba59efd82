"""Llama 1 to 3.2, and the many models that share its shape (SmolLM2, TinyLlama, Yi, ...)."""

from kvist.models.family import Family

FAMILY = Family(
    name="llama",
    hf_architecture="LlamaForCausalLM",
    qkv_bias=None,
    output_bias_with_qkv=True,
    qk_norm=False,
    default_head_dim=None,
    gguf_interleaves_rotation=True,
)
