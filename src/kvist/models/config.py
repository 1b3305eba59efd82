"""The dimensions and features of a model, without torch. A model's family (families/) reads them from config.json or a
GGUF header, with config_hf.py or config_gguf.py; all other rooms use them.

A feature that Kvist cannot compute exactly (sliding windows, experts, other rope types, quantised safetensors) is
refused with an error that names its field: a model that loads gives the right results. weights.py checks the tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvist.models.fields import ConfigFields

DEFAULT_ROPE_THETA = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRope:
    """Every frequency divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Low frequencies divided by `factor`, high frequencies kept, frequencies in between blended (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DividedRope:
    """Frequency i divided by `divisors[i]`: the form of the Llama 3.1 scaling in GGUF files (`rope_freqs.weight`)."""

    divisors: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRope:
    """Frequencies of dimensions with fewer than `beta_slow` rotations over the original context are divided by
    `factor`, with more than `beta_fast` rotations kept, in between blended; q and k are multiplied by
    `attention_factor` (YaRN, https://arxiv.org/abs/2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float
    truncate: bool = True  # round the ends of the blend to whole dimensions

    @property
    def max_position_embeddings(self) -> int:
        """The context length of the model with this scaling."""
        return int(self.factor * self.original_max_position_embeddings)


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


RopeScaling = LinearRope | Llama3Rope | DividedRope | YarnRope


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    family: str  # a key of families.FAMILIES
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool  # on q, k and v
    attention_output_bias: bool  # on o_proj
    weight_format: str = "plain"  # of the linear layers' matrices; a key of formats.FORMATS
    eos_token_ids: tuple[int, ...]


def read_heads(
    fields: ConfigFields, names: tuple[str, str, str], hidden_size: int, default_head_dim: int | None = None
) -> tuple[int, int, int]:
    """Read (num_heads, num_kv_heads, head_dim) from the fields `names`."""
    num_heads = fields.integer(names[0])
    num_kv_heads = fields.integer(names[1], num_heads)
    head_dim = fields.integer(names[2], default_head_dim or max(1, hidden_size // num_heads))
    if num_heads % num_kv_heads:
        raise fields.error(names[1], f"is {num_kv_heads}, which does not divide {num_heads} attention heads")
    if head_dim % 2:
        raise fields.error("head_dim", f"is {head_dim}; rotary embedding needs an even number")
    return num_heads, num_kv_heads, head_dim
