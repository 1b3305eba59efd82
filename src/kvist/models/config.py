"""What a model is, in numbers, without torch: read by config_hf.py or config_gguf.py, used by everything else.

A feature we cannot compute exactly (sliding windows, experts, other rope types, quantised safetensors) is refused by
the readers, by the name of its field: a model that loads is a model that is right. The tensors themselves are checked
in weights.py.
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
    """Low frequencies divided by `factor`, high ones kept, those between blended (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DividedRope:
    """Frequency i divided by `divisors[i]`: how GGUF files carry the Llama 3.1 scaling (`rope_freqs.weight`)."""

    divisors: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRope:
    """Dimensions that turn fewer than `beta_slow` times over the original context are divided by `factor`, those that
    turn more than `beta_fast` times kept, those between blended; q and k grow by `attention_factor` (YaRN,
    https://arxiv.org/abs/2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float
    truncate: bool = True  # the ends of the blend are whole dimensions

    @property
    def max_position_embeddings(self) -> int:
        """What the model can hold with it."""
        return int(self.factor * self.original_max_position_embeddings)


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


RopeScaling = LinearRope | Llama3Rope | DividedRope | YarnRope


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    family: str
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
    qk_norm: bool
    eos_token_ids: tuple[int, ...]


def read_heads(
    fields: ConfigFields, names: tuple[str, str, str], hidden_size: int, default_head_dim: int | None = None
) -> tuple[int, int, int]:
    """(num_heads, num_kv_heads, head_dim), by these names."""
    num_heads = fields.integer(names[0])
    num_kv_heads = fields.integer(names[1], num_heads)
    head_dim = fields.integer(names[2], default_head_dim or max(1, hidden_size // num_heads))
    if num_heads % num_kv_heads:
        raise fields.error(names[1], f"is {num_kv_heads}, which does not divide {num_heads} attention heads")
    if head_dim % 2:
        raise fields.error("head_dim", f"is {head_dim}; the rotation needs an even number")
    return num_heads, num_kv_heads, head_dim
