"""Qwen3 (dense): q and k are normalised per head, and head_dim does not follow from hidden_size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvist.models.config import ModelConfig
from kvist.models.config_gguf import GgufConfig
from kvist.models.config_hf import HfConfig

if TYPE_CHECKING:
    from kvist.models.decoder import DeclaredModel


class Qwen3:
    hf_model_type = "qwen3"
    hf_architecture = "Qwen3ForCausalLM"
    gguf_architecture = "qwen3"

    def config_from_hf(self, hf: HfConfig) -> ModelConfig:
        hf.require_activation("silu", "swish")
        hf.refuse_experts()
        hf.refuse_sliding_windows()
        bias = hf.fields.flag("attention_bias", False)
        return hf.decoder(attention_bias=bias, attention_output_bias=bias, default_head_dim=128)

    def config_from_gguf(self, gguf: GgufConfig) -> ModelConfig:
        gguf.refuse_experts()
        gguf.refuse_sliding_windows()
        return gguf.decoder(attention_bias=gguf.has_tensor("blk.0.attn_q.bias"))

    def declare(self, config: ModelConfig) -> DeclaredModel:
        from kvist.models.decoder import attention, decoder, decoder_layer, gated_mlp

        layers = [
            decoder_layer(config, layer, attention(config, layer, qk_norm=True), gated_mlp(config, layer))
            for layer in range(config.num_layers)
        ]
        return decoder(config, layers)
