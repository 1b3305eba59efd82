"""`ModelConfig` from the header of a GGUF file. Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from kvist.checkpoint import GgufHeader
from kvist.errors import ModelLoadError
from kvist.models.config import (
    DEFAULT_ROPE_THETA,
    DividedRope,
    LinearRope,
    ModelConfig,
    RopeScaling,
    YarnRope,
    read_heads,
    yarn_attention_factor,
)
from kvist.models.end_tokens import end_tokens_by_text
from kvist.models.fields import ConfigFields

ROPE_DIVISORS = "rope_freqs.weight"  # a tensor that belongs to the configuration, not to a layer
_F32 = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufConfig:
    """The header of a GGUF file while a family reads it."""

    family: str
    path: Path
    header: GgufHeader
    fields: ConfigFields  # the metadata of the architecture, without its prefix
    eos_token_ids: tuple[int, ...]

    def has_tensor(self, name: str) -> bool:
        return name in self.header.tensors

    def decoder(self, *, attention_bias: bool) -> ModelConfig:
        """Read the fields of a decoder whose layers are alike: attention over the whole context, and a gated MLP."""
        fields = self.fields
        embedding = self.header.tensors.get("token_embd.weight")
        if embedding is None:
            raise ModelLoadError(f"{self.path}: tensor token_embd.weight is missing")
        hidden_size = fields.integer("embedding_length")
        names = ("attention.head_count", "attention.head_count_kv", "attention.key_length")
        num_heads, num_kv_heads, head_dim = read_heads(fields, names, hidden_size)
        _check_head_dims(fields, head_dim)
        rope_scaling = _rope_scaling(self.path, self.header, fields, head_dim)
        max_positions = fields.integer("context_length")
        if isinstance(rope_scaling, YarnRope):  # some files give the length with the scaling, some without
            max_positions = max(max_positions, rope_scaling.max_position_embeddings)
        return ModelConfig(
            family=self.family,
            num_layers=fields.integer("block_count"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=fields.integer("feed_forward_length"),
            vocab_size=embedding.shape[0],
            rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
            rope_theta=fields.number("rope.freq_base", DEFAULT_ROPE_THETA),
            rope_scaling=rope_scaling,
            max_position_embeddings=max_positions,
            tie_word_embeddings=not self.has_tensor("output.weight"),
            attention_bias=attention_bias,
            attention_output_bias=self.has_tensor("blk.0.attn_output.bias"),
            eos_token_ids=self.eos_token_ids,
        )

    def refuse_experts(self) -> None:
        count = self.fields.value("expert_count")
        if count not in (None, 0):
            raise self.fields.error("expert_count", f"is {count!r}: experts (MoE) are not supported in this family")

    def refuse_sliding_windows(self) -> None:
        if self.fields.value("attention.sliding_window") not in (None, 0):
            raise self.fields.error("attention.sliding_window", "is set: sliding windows are not supported")


def read_eos_token_ids(metadata: ConfigFields) -> tuple[int, ...]:
    """Return the ids of end of sequence, end of turn and end of message: each of them ends an answer. A file that names
    no end of turn may still have such a token in its vocabulary."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [token for name in names for token in metadata.token_ids(f"tokenizer.ggml.{name}")]
    if "tokenizer.ggml.eot_token_id" not in metadata:
        tokens, kinds = metadata.value("tokenizer.ggml.tokens"), metadata.value("tokenizer.ggml.token_type")
        if isinstance(tokens, list) and isinstance(kinds, list):
            ids += end_tokens_by_text(tokens, kinds)
    return tuple(dict.fromkeys(ids))


def _check_head_dims(fields: ConfigFields, head_dim: int) -> None:
    for name in ("rope.dimension_count", "attention.value_length"):
        size = fields.integer(name, head_dim)
        if size != head_dim:
            raise fields.error(name, f"is {size}, but attention keys have {head_dim}: unequal sizes are not supported")


def _rope_scaling(path: Path, header: GgufHeader, fields: ConfigFields, head_dim: int) -> RopeScaling | None:
    kind = fields.text("rope.scaling.type", "none")
    if kind == "yarn":
        if ROPE_DIVISORS in header.tensors:
            raise fields.error("rope.scaling.type", f"is yarn, but the file also has the tensor {ROPE_DIVISORS}")
        return _yarn(fields)
    if kind not in ("none", "linear"):
        raise fields.error("rope.scaling.type", f"is {kind!r}; supported are none, linear and yarn")
    factor_field = "rope.scaling.factor" if "rope.scaling.factor" in fields else "rope.scale_linear"
    factor = fields.number(factor_field, 1.0)
    if ROPE_DIVISORS not in header.tensors:
        return LinearRope(factor=factor) if kind == "linear" or factor != 1.0 else None
    if kind == "linear":
        raise fields.error("rope.scaling.type", f"is linear, but the file also has the tensor {ROPE_DIVISORS}")
    return _read_divisors(path, header, head_dim)


def _yarn(fields: ConfigFields) -> YarnRope:
    if fields.value("rope.scaling.yarn_ext_factor") not in (None, 1, 1.0):
        raise fields.error("rope.scaling.yarn_ext_factor", "is not 1: other extrapolation factors are not supported")
    if fields.value("rope.scaling.yarn_log_multiplier") not in (None, 0, 0.0):
        raise fields.error("rope.scaling.yarn_log_multiplier", "is set: it is not supported")
    factor = fields.number("rope.scaling.factor")
    given = fields.number("rope.scaling.yarn_attn_factor", fields.number("rope.scaling.attn_factor", 1.0))
    return YarnRope(
        factor=factor,
        original_max_position_embeddings=fields.integer(
            "rope.scaling.original_context_length", fields.integer("context_length")
        ),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=given * yarn_attention_factor(factor),
    )


def _read_divisors(path: Path, header: GgufHeader, head_dim: int) -> DividedRope:
    tensor = header.tensors[ROPE_DIVISORS]
    count = head_dim // 2
    if tensor.ggml_type != _F32 or tensor.shape != (count,):
        raise ModelLoadError(f"{path}: tensor {ROPE_DIVISORS} must be {count} float32 numbers, not {tensor}")
    with path.open("rb") as stream:
        stream.seek(tensor.offset)
        raw = stream.read(4 * count)
    if len(raw) != 4 * count:
        raise ModelLoadError(f"{path}: the file ends inside tensor {ROPE_DIVISORS}")
    return DividedRope(divisors=struct.unpack(f"<{count}f", raw))
