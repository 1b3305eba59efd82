"""`ModelConfig` from a Hugging Face folder written by transformers 4 or 5."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.checkpoint import Checkpoint, read_json
from kvist.models.config import (
    DEFAULT_ROPE_THETA,
    LinearRope,
    Llama3Rope,
    ModelConfig,
    RopeScaling,
    YarnRope,
    read_heads,
    yarn_attention_factor,
)
from kvist.models.end_tokens import end_tokens_of_tokenizer
from kvist.models.fields import ConfigFields


@dataclass(frozen=True, slots=True, kw_only=True)
class HfConfig:
    """config.json while a family reads it."""

    family: str
    fields: ConfigFields
    eos_token_ids: tuple[int, ...]

    def decoder(
        self, *, attention_bias: bool, attention_output_bias: bool, default_head_dim: int | None = None
    ) -> ModelConfig:
        """Read the fields of a decoder whose layers are alike: attention over the whole context, and a gated MLP."""
        fields = self.fields
        self._refuse_other_decoders()
        hidden_size = fields.integer("hidden_size")
        names = ("num_attention_heads", "num_key_value_heads", "head_dim")
        num_heads, num_kv_heads, head_dim = read_heads(fields, names, hidden_size, default_head_dim)
        max_positions = fields.integer("max_position_embeddings")
        rope_theta, rope_scaling = _read_rope(fields, max_positions)
        if isinstance(rope_scaling, YarnRope):  # some configs give the length with the scaling, some without
            max_positions = max(max_positions, rope_scaling.max_position_embeddings)
        return ModelConfig(
            family=self.family,
            num_layers=fields.integer("num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=fields.integer("intermediate_size"),
            vocab_size=fields.integer("vocab_size"),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=max_positions,
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            attention_bias=attention_bias,
            attention_output_bias=attention_output_bias,
            eos_token_ids=self.eos_token_ids,
        )

    def _refuse_other_decoders(self) -> None:
        fields = self.fields
        for name in ("quantization_config", "compression_config"):
            if name in fields:
                raise fields.error(name, "is set: quantised safetensors are not supported; use plain weights or a GGUF")
        if fields.flag("mlp_bias", False):
            raise fields.error("mlp_bias", "is true: MLP biases are not supported")
        if fields.value("partial_rotary_factor") not in (None, 1, 1.0):
            raise fields.error("partial_rotary_factor", "is not 1: rotating only a part of each head is not supported")

    def require_activation(self, *names: str) -> None:
        """Refuse any other activation of the MLP than `names`, which are names of one function."""
        activation = self.fields.text("hidden_act", names[0])
        if activation not in names:
            raise self.fields.error("hidden_act", f"is {activation!r}; only {names[0]} is supported in this family")

    def refuse_experts(self) -> None:
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            value = self.fields.value(name)
            if value not in (None, 0):
                raise self.fields.error(name, f"is {value!r}: experts (MoE) are not supported in this family")

    def refuse_sliding_windows(self) -> None:
        fields = self.fields
        num_layers = fields.integer("num_hidden_layers")
        layer_types = fields.value("layer_types")
        if layer_types is not None:
            others = (
                sorted({str(kind) for kind in layer_types} - {"full_attention"})
                if isinstance(layer_types, list)
                else []
            )
            if others or not isinstance(layer_types, list):
                raise fields.error(
                    "layer_types", f"contains {others or layer_types!r}; only full_attention is supported"
                )
            return
        if "sliding_window" not in fields:
            return
        # Qwen configs have a sliding_window that use_sliding_window disables
        used = fields.flag(
            "use_sliding_window", "use_sliding_window" not in fields and "max_window_layers" not in fields
        )
        if used and fields.integer("max_window_layers", 0, minimum=0) < num_layers:
            raise fields.error(
                "sliding_window", f"is {fields.value('sliding_window')!r} and in use: it is not supported"
            )


def read_eos_token_ids(checkpoint: Checkpoint, fields: ConfigFields) -> tuple[int, ...]:
    """Return the end tokens of config.json, generation_config.json and the tokenizer: chat models often name their
    end-of-turn token in only one of these files."""
    eos = fields.token_ids("eos_token_id")
    path = checkpoint.path / "generation_config.json"
    if path.is_file():
        eos += ConfigFields(read_json(path), origin=str(path)).token_ids("eos_token_id")
    return tuple(dict.fromkeys(eos + end_tokens_of_tokenizer(checkpoint.path)))


def _read_rope(fields: ConfigFields, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Read theta and scaling. transformers 5 writes `rope_parameters`; transformers 4 `rope_theta` and
    `rope_scaling`."""
    theta = fields.number("rope_theta", DEFAULT_ROPE_THETA)
    rope = fields.section("rope_parameters") or fields.section("rope_scaling")
    if rope is None:
        return theta, None
    theta = rope.number("rope_theta", theta)
    if rope.value("partial_rotary_factor") not in (None, 1, 1.0):
        raise rope.error("partial_rotary_factor", "is not 1: rotating only a part of each head is not supported")
    kind_field = "rope_type" if "rope_type" in rope else "type"
    kind = rope.text(kind_field)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRope(factor=rope.number("factor"))
    if kind == "llama3":
        return theta, Llama3Rope(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position_embeddings=rope.integer("original_max_position_embeddings", max_positions),
        )
    if kind == "yarn":
        return theta, _read_yarn(fields, rope, max_positions)
    raise rope.error(kind_field, f"is {kind!r}; supported are default, linear, llama3 and yarn")


def _read_yarn(fields: ConfigFields, rope: ConfigFields, max_positions: int) -> YarnRope:
    original = rope.integer("original_max_position_embeddings", max_positions)
    if "original_max_position_embeddings" in fields:
        original = fields.integer("original_max_position_embeddings")
    factor = rope.number("factor", max_positions / original)
    if "mscale" in rope and "mscale_all_dim" in rope:
        scales = (yarn_attention_factor(factor, rope.number(name)) for name in ("mscale", "mscale_all_dim"))
        attention_factor = next(scales) / next(scales)
    else:
        attention_factor = yarn_attention_factor(factor)
    return YarnRope(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.number("attention_factor", attention_factor),
        truncate=rope.flag("truncate", True),
    )
