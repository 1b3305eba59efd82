"""Qwen2 and Qwen2.5: the shape of Llama with a bias on q, k and v."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvist.models.config import ModelConfig
from kvist.models.config_gguf import GgufConfig
from kvist.models.config_hf import HfConfig

if TYPE_CHECKING:
    from kvist.models.decoder import DeclaredModel


class Qwen2:
    hf_model_type = "qwen2"
    hf_architecture = "Qwen2ForCausalLM"
    gguf_architecture = "qwen2"

    def config_from_hf(self, hf: HfConfig) -> ModelConfig:
        hf.require_activation("silu", "swish")
        hf.refuse_experts()
        hf.refuse_sliding_windows()
        return hf.decoder(attention_bias=True, attention_output_bias=False)

    def config_from_gguf(self, gguf: GgufConfig) -> ModelConfig:
        gguf.refuse_experts()
        gguf.refuse_sliding_windows()
        return gguf.decoder(attention_bias=True)

    def declare(self, config: ModelConfig) -> DeclaredModel:
        from kvist.models.decoder import attention, decoder, decoder_layer, gated_mlp

        layers = [
            decoder_layer(config, layer, attention(config, layer), gated_mlp(config, layer))
            for layer in range(config.num_layers)
        ]
        return decoder(config, layers)
