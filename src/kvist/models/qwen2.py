"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v."""

from kvist.models.family import Family

FAMILY = Family(
    name="qwen2",
    hf_architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    output_bias_with_qkv=False,
    qk_norm=False,
    default_head_dim=None,
    gguf_interleaves_rotation=False,
)
