"""The decoder-only transformer of llama, qwen2 and qwen3: inference only, plain PyTorch on a CPU, the kernels of
kernels/ on a GPU.

A layer is: RMSNorm, fused q+k+v, (norm of q and k), rotation, `attend`, o; RMSNorm, fused gate+up, down. The T tokens
of all requests of a step are concatenated; only `attend` knows which tokens belong to which request, and only `attend`
reads and writes the cache. Differences between families are flags of `ModelConfig`, resolved when a layer is built.

Batching, pages and sampling are elsewhere. Callers run the model under torch.inference_mode().
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.attention.backend import Attend, RotatingAttend
from kvist.kernels.norm import add_rms_norm
from kvist.kernels.operands import Rotary
from kvist.kernels.rotary import norm_and_rotate, rotation
from kvist.models.config import ModelConfig
from kvist.models.parallel import (
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
    VocabParallelHead,
    VocabShard,
    column_parallel,
    gated_parallel,
)
from kvist.models.rope import inverse_frequencies, rotation_scale
from kvist.models.weights import WeightReader


class Attention:
    def __init__(self, config: ModelConfig, reader: WeightReader, prefix: str, tp: TensorParallel) -> None:
        q_heads = tp.shard(config.num_heads, "attention heads")
        kv_heads = tp.kv_heads(config.num_kv_heads)
        self._num_q_heads = q_heads.stop - q_heads.start
        self._num_kv_heads = kv_heads.stop - kv_heads.start
        self._head_dim = config.head_dim
        self._eps = config.rms_norm_eps
        q_rows, kv_rows = _scaled(q_heads, config.head_dim), _scaled(kv_heads, config.head_dim)
        rows = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
        named_rows = {f"{prefix}.{name}": part for name, part in rows.items()}
        self._qkv = column_parallel(reader, named_rows, bias=config.attention_bias)
        self._output = RowParallelLinear(reader, f"{prefix}.o_proj", q_rows, tp, bias=config.attention_output_bias)
        self._qk_weight = self._read_qk_norm(reader, prefix) if config.qk_norm else None

    def _read_qk_norm(self, reader: WeightReader, prefix: str) -> Tensor:
        """Return the norm weights of q and k, [num_q_heads + num_kv_heads, head_dim], one row per head."""
        q_weight, k_weight = (reader.read(f"{prefix}.{name}.weight") for name in ("q_norm", "k_norm"))
        return torch.cat((q_weight.expand(self._num_q_heads, -1), k_weight.expand(self._num_kv_heads, -1)))

    def attend(self, x: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [T, hidden_size] -> [T, num_q_heads * head_dim], before the output projection."""
        heads = self._qkv(x).view(x.shape[0], -1, self._head_dim)
        rotary = Rotary(cos=cos, sin=sin, qk_weight=self._qk_weight, eps=self._eps)
        if isinstance(attend, RotatingAttend):
            out = attend.rotated(layer, heads, rotary)
        else:
            num_rotated = self._num_q_heads + self._num_kv_heads
            qk = norm_and_rotate(heads[:, :num_rotated], rotary)
            out = attend(layer, qk[:, : self._num_q_heads], qk[:, self._num_q_heads :], heads[:, num_rotated:])
        return out.reshape(x.shape[0], -1)

    def project(self, heads: Tensor) -> Tensor:
        """The result of `attend`, or some of its rows -> [num_rows, hidden_size]."""
        return self._output(heads)


class GatedMlp:
    def __init__(self, config: ModelConfig, reader: WeightReader, prefix: str, tp: TensorParallel) -> None:
        rows = tp.shard(config.intermediate_size, "MLP rows")
        self._gated = gated_parallel(reader, {f"{prefix}.{name}": rows for name in ("gate_proj", "up_proj")})
        self._down = RowParallelLinear(reader, f"{prefix}.down_proj", rows, tp, bias=False)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._gated(x))


class DecoderLayer:
    def __init__(self, config: ModelConfig, reader: WeightReader, layer: int, tp: TensorParallel) -> None:
        prefix = f"model.layers.{layer}"
        self._layer = layer
        self._eps = config.rms_norm_eps
        self._attention_norm = reader.read(f"{prefix}.input_layernorm.weight")
        self._attention = Attention(config, reader, f"{prefix}.self_attn", tp)
        self._mlp_norm = reader.read(f"{prefix}.post_attention_layernorm.weight")
        self._mlp = GatedMlp(config, reader, f"{prefix}.mlp", tp)

    def attend(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) of the previous layer -> (heads, residual). After this call rows are independent of each other,
        and nothing more is written to the cache."""
        x, residual = add_rms_norm(x, residual, self._attention_norm, self._eps)
        return self._attention.attend(x, self._layer, cos, sin, attend), residual

    def finish(self, heads: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the rest of the layer -> (x, residual) for the next layer."""
        x, residual = add_rms_norm(self._attention.project(heads), residual, self._mlp_norm, self._eps)
        return self._mlp(x), residual


class EmbeddingAndHead:
    """The embedding and the head. When they are tied, the checkpoint has one matrix for both."""

    def __init__(self, config: ModelConfig, reader: WeightReader, tp: TensorParallel) -> None:
        shard = VocabShard.of(config.vocab_size, tp)
        weight = shard.read(reader, "model.embed_tokens.weight")
        self.embed = VocabParallelEmbedding(weight, shard, tp)
        head_weight = weight if config.tie_word_embeddings else shard.read(reader, "lm_head.weight")
        self.head = VocabParallelHead(head_weight, config.vocab_size, tp)
        self.norm = reader.read("model.norm.weight")
        self.tp = tp


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A step before the last layer's output projection and MLP. Most rows of a prompt stop here: their K/V is written,
    and no token is sampled for them."""

    heads: Tensor  # [num_rows, this rank's heads * head_dim]
    residual: Tensor  # [num_rows, hidden_size]

    def select(self, rows: Tensor) -> Unfinished:
        """rows [R] int32 or int64."""
        return Unfinished(heads=self.heads.index_select(0, rows), residual=self.residual.index_select(0, rows))


class CausalLM:
    """This rank's part of a model. Immutable once built, so any number of callers may share it."""

    def __init__(self, config: ModelConfig, vocab: EmbeddingAndHead, layers: list[DecoderLayer]) -> None:
        self.config = config
        self._vocab = vocab
        self._layers = layers
        self._frequencies = inverse_frequencies(config).to(vocab.norm.device)
        self._rotation_scale = rotation_scale(config)

    def begin(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Unfinished:
        """Compute up to the last layer's attention, so that all K/V of this rank is in the cache. token_ids, positions
        [T] int64."""
        cos, sin = rotation(positions, self._frequencies)
        if self._rotation_scale != 1.0:
            cos, sin = cos * self._rotation_scale, sin * self._rotation_scale
        *layers, last = self._layers
        x, residual = self._vocab.embed(token_ids), None
        for layer in layers:
            x, residual = layer.finish(*layer.attend(x, residual, cos, sin, attend))
        heads, residual = last.attend(x, residual, cos, sin, attend)
        return Unfinished(heads=heads, residual=residual)

    def finish(self, unfinished: Unfinished) -> Tensor:
        """Return hidden [num_rows, hidden_size] after the last norm, in the model's dtype."""
        x, residual = self._layers[-1].finish(unfinished.heads, unfinished.residual)
        return add_rms_norm(x, residual, self._vocab.norm, self.config.rms_norm_eps)[0]

    def sync_ranks(self, unfinished: Unfinished) -> None:
        """Wait until the K/V of every rank is in the cache. `finish` implies this; call it for a step without
        `finish`."""
        if self._vocab.tp.size > 1:
            self._vocab.tp.all_reduce(unfinished.residual.new_zeros(1))

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Begin and finish all rows: returns hidden [T, hidden_size]."""
        return self.finish(self.begin(token_ids, positions, attend))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size] -> logits [R, vocab_size] fp32, complete on every rank."""
        return self._vocab.head(hidden)


def _scaled(heads: slice, head_dim: int) -> slice:
    return slice(heads.start * head_dim, heads.stop * head_dim)
