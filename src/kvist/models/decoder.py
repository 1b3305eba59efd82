"""The parts of a decoder-only transformer: inference only, plain PyTorch on a CPU, the kernels of kernels/ on a GPU.

A layer is: RMSNorm, fused q+k+v, (norm of q and k), rotation, `attend`, o; RMSNorm, MLP. The T tokens of all requests
of a step are concatenated; only `attend` knows which tokens belong to which request, and only `attend` reads and writes
the cache. `attention`, `gated_mlp` and the other functions in lower case declare a part with its tensors and their
names; a family (families/) composes these parts.

Batching, pages and sampling are elsewhere. Callers run the model under torch.inference_mode().
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.attention.backend import Attend
from kvist.kernels.norm import add_rms_norm
from kvist.kernels.operands import Rotary
from kvist.kernels.rotary import rotation
from kvist.models.config import ModelConfig
from kvist.models.formats import FORMATS
from kvist.models.layers import (
    VocabParallelEmbedding,
    VocabParallelHead,
    column_parallel,
    gated_parallel,
    row_parallel,
)
from kvist.models.linear import Linear
from kvist.models.parallel import TensorParallel
from kvist.models.rope import inverse_frequencies, rotation_scale
from kvist.models.tensors import DeclaredTensor, KvHeads, Location, Names, PaddedShards, Shards, Whole
from kvist.models.weights import Declared, WeightReader

Mlp = Callable[[Tensor], Tensor]  # x [T, hidden_size] -> the same, complete on every rank


def layer_names(layer: int, hf: str, gguf: str, *, gguf_paired_head_dim: int | None = None) -> Names:
    """Return the names of a linear or norm of one layer."""
    return Names(
        hf=Location(f"model.layers.{layer}.{hf}"),
        gguf=Location(f"blk.{layer}.{gguf}", paired_head_dim=gguf_paired_head_dim),
    )


class Attention:
    def __init__(
        self, *, qkv: Linear, output: Linear, num_q_heads: int, num_kv_heads: int, qk_weight: Tensor | None, eps: float
    ) -> None:
        """The numbers of heads are this rank's. `qk_weight` [num_q_heads + num_kv_heads, head_dim]: the norm of q and
        k."""
        self._qkv = qkv
        self._output = output
        self._num_heads = num_q_heads + 2 * num_kv_heads  # of q, k and v
        self._qk_weight = qk_weight
        self._eps = eps

    def attend(self, x: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [T, hidden_size] -> [T, num_q_heads * head_dim], before the output projection."""
        heads = self._qkv(x).view(x.shape[0], self._num_heads, -1)
        rotary = Rotary(cos=cos, sin=sin, qk_weight=self._qk_weight, eps=self._eps)
        return attend(layer, heads, rotary).reshape(x.shape[0], -1)

    def project(self, heads: Tensor) -> Tensor:
        """The result of `attend`, or some of its rows -> [num_rows, hidden_size]."""
        return self._output(heads)


def attention(
    config: ModelConfig, layer: int, *, qk_norm: bool = False, gguf_pairs: bool = False
) -> Declared[Attention]:
    """Declare the attention of one layer. `gguf_pairs`: GGUF files have the rows of q and k as rotation pairs."""
    hidden, head_dim = Whole(config.hidden_size), config.head_dim
    q_rows = Shards(config.num_heads, "attention heads", head_dim)
    kv_rows = KvHeads(config.num_kv_heads, head_dim)
    paired = head_dim if gguf_pairs else None
    q = layer_names(layer, "self_attn.q_proj", "attn_q", gguf_paired_head_dim=paired)
    k = layer_names(layer, "self_attn.k_proj", "attn_k", gguf_paired_head_dim=paired)
    v = layer_names(layer, "self_attn.v_proj", "attn_v")
    o = layer_names(layer, "self_attn.o_proj", "attn_output")
    matrices = [q.matrix(q_rows, hidden), k.matrix(kv_rows, hidden), v.matrix(kv_rows, hidden)]
    biases = [q.bias(q_rows), k.bias(kv_rows), v.bias(kv_rows)] if config.attention_bias else []
    weight_format = FORMATS[config.weight_format]
    qkv = column_parallel(matrices, biases, weight_format)
    output_bias = o.bias(hidden) if config.attention_output_bias else None
    output = row_parallel(o.matrix(hidden, q_rows), output_bias, weight_format)
    norms = _qk_norms(layer, head_dim) if qk_norm else ()

    def load(reader: WeightReader) -> Attention:
        num_q_heads = q_rows.length_on(reader.tp) // head_dim
        num_kv_heads = kv_rows.length_on(reader.tp) // head_dim
        counts = (num_q_heads, num_kv_heads)
        weights = [reader.read(norm).expand(count, -1) for norm, count in zip(norms, counts, strict=bool(norms))]
        return Attention(
            qkv=qkv.load(reader),
            output=output.load(reader),
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            qk_weight=torch.cat(weights) if weights else None,
            eps=config.rms_norm_eps,
        )

    return Declared((*qkv.tensors, *output.tensors, *norms), load)


def _qk_norms(layer: int, head_dim: int) -> tuple[DeclaredTensor, DeclaredTensor]:
    names = (("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"))
    q_norm, k_norm = (layer_names(layer, hf, gguf).norm(head_dim) for hf, gguf in names)
    return q_norm, k_norm


def gated_mlp(config: ModelConfig, layer: int) -> Declared[Mlp]:
    """Declare the map x -> down(SiLU(gate(x)) * up(x))."""
    hidden, inner = Whole(config.hidden_size), Shards(config.intermediate_size, "MLP rows")
    gate, up = (layer_names(layer, f"mlp.{name}_proj", f"ffn_{name}").matrix(inner, hidden) for name in ("gate", "up"))
    weight_format = FORMATS[config.weight_format]
    gated = gated_parallel(gate, up, weight_format)
    down = row_parallel(layer_names(layer, "mlp.down_proj", "ffn_down").matrix(hidden, inner), None, weight_format)

    def load(reader: WeightReader) -> Mlp:
        return GatedMlp(gated.load(reader), down.load(reader))

    return Declared((*gated.tensors, *down.tensors), load)


class GatedMlp:
    def __init__(self, gated: Linear, down: Linear) -> None:
        self._gated = gated
        self._down = down

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._gated(x))


class DecoderLayer:
    def __init__(
        self, layer: int, *, attention_norm: Tensor, attention: Attention, mlp_norm: Tensor, mlp: Mlp, eps: float
    ) -> None:
        self._layer = layer
        self._eps = eps
        self._attention_norm = attention_norm
        self._attention = attention
        self._mlp_norm = mlp_norm
        self._mlp = mlp

    def attend(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) of the previous layer -> (heads, residual). After this call rows are independent of each other,
        and nothing more is written to the cache."""
        x, residual = add_rms_norm(x, residual, self._attention_norm, self._eps)
        return self._attention.attend(x, self._layer, cos, sin, attend), residual

    def project_and_mlp(self, heads: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the rest of the layer -> (x, residual) for the next layer."""
        x, residual = add_rms_norm(self._attention.project(heads), residual, self._mlp_norm, self._eps)
        return self._mlp(x), residual


def decoder_layer(
    config: ModelConfig, layer: int, attention: Declared[Attention], mlp: Declared[Mlp]
) -> Declared[DecoderLayer]:
    attention_norm = layer_names(layer, "input_layernorm", "attn_norm").norm(config.hidden_size)
    mlp_norm = layer_names(layer, "post_attention_layernorm", "ffn_norm").norm(config.hidden_size)

    def load(reader: WeightReader) -> DecoderLayer:
        return DecoderLayer(
            layer,
            attention_norm=reader.read(attention_norm),
            attention=attention.load(reader),
            mlp_norm=reader.read(mlp_norm),
            mlp=mlp.load(reader),
            eps=config.rms_norm_eps,
        )

    return Declared((attention_norm, *attention.tensors, mlp_norm, *mlp.tensors), load)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingAndHead:
    """The ends of a model. When embedding and head are tied, the checkpoint has one matrix for both."""

    embed: VocabParallelEmbedding
    norm: Tensor
    head: VocabParallelHead
    tp: TensorParallel


def embedding_and_head(config: ModelConfig) -> Declared[EmbeddingAndHead]:
    vocabulary, hidden = PaddedShards(config.vocab_size), Whole(config.hidden_size)
    embedding = Names(hf=Location("model.embed_tokens"), gguf=Location("token_embd")).matrix(vocabulary, hidden)
    norm = Names(hf=Location("model.norm"), gguf=Location("output_norm")).norm(config.hidden_size)
    own_head = Names(hf=Location("lm_head"), gguf=Location("output")).matrix(vocabulary, hidden)
    head = embedding if config.tie_word_embeddings else own_head

    def load(reader: WeightReader) -> EmbeddingAndHead:
        weight = reader.read(embedding)
        head_weight = weight if head is embedding else reader.read(head)
        return EmbeddingAndHead(
            embed=VocabParallelEmbedding(weight, vocabulary, reader.tp),
            norm=reader.read(norm),
            head=VocabParallelHead(head_weight, config.vocab_size, reader.tp),
            tp=reader.tp,
        )

    return Declared((embedding, norm) if head is embedding else (embedding, norm, head), load)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialForward:
    """A forward pass up to the last layer's output projection and MLP. Most rows of a prompt stop here: their K/V is
    written, and no token is sampled for them."""

    heads: Tensor  # [num_rows, this rank's heads * head_dim]
    residual: Tensor  # [num_rows, hidden_size]

    def select(self, rows: Tensor) -> PartialForward:
        """rows [R] int32 or int64."""
        return PartialForward(heads=self.heads.index_select(0, rows), residual=self.residual.index_select(0, rows))


class CausalLM:
    """This rank's part of a model. Immutable once built, so any number of callers may share it."""

    def __init__(self, config: ModelConfig, vocab: EmbeddingAndHead, layers: Sequence[DecoderLayer]) -> None:
        self.config = config
        self._vocab = vocab
        self._layers = layers
        self._frequencies = inverse_frequencies(config).to(vocab.norm.device)
        self._rotation_scale = rotation_scale(config)

    def begin_forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> PartialForward:
        """Compute up to the last layer's attention, so that all K/V of this rank is in the cache. token_ids, positions
        [T] int64."""
        cos, sin = rotation(positions, self._frequencies)
        if self._rotation_scale != 1.0:
            cos, sin = cos * self._rotation_scale, sin * self._rotation_scale
        *layers, last = self._layers
        x, residual = self._vocab.embed(token_ids), None
        for layer in layers:
            x, residual = layer.project_and_mlp(*layer.attend(x, residual, cos, sin, attend))
        heads, residual = last.attend(x, residual, cos, sin, attend)
        return PartialForward(heads=heads, residual=residual)

    def finish_forward(self, unfinished: PartialForward) -> Tensor:
        """Return hidden [num_rows, hidden_size] after the last norm, in the model's dtype."""
        x, residual = self._layers[-1].project_and_mlp(unfinished.heads, unfinished.residual)
        return add_rms_norm(x, residual, self._vocab.norm, self.config.rms_norm_eps)[0]

    def barrier(self, unfinished: PartialForward) -> None:
        """Wait until the K/V of every rank is in the cache. `finish_forward` implies this; call `barrier`
        for a step without it."""
        if self._vocab.tp.size > 1:
            self._vocab.tp.all_reduce(unfinished.residual.new_zeros(1))

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Begin and finish all rows: returns hidden [T, hidden_size]."""
        return self.finish_forward(self.begin_forward(token_ids, positions, attend))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size] -> logits [R, vocab_size] fp32, complete on every rank."""
        return self._vocab.head(hidden)


def _scaled(heads: slice, head_dim: int) -> slice:
    return slice(heads.start * head_dim, heads.stop * head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredModel:
    """A model before its weights are read."""

    config: ModelConfig
    vocab: Declared[EmbeddingAndHead]
    layers: tuple[Declared[DecoderLayer], ...]
    redundant: tuple[str, ...]  # ends of the names of tensors that a checkpoint may have and that are not needed

    @property
    def tensors(self) -> tuple[DeclaredTensor, ...]:
        return (*self.vocab.tensors, *(tensor for layer in self.layers for tensor in layer.tensors))

    def check_split(self, tp: TensorParallel) -> None:
        """Raise `ConfigError` when the model cannot be split over the ranks of `tp`."""
        for tensor in self.tensors:
            tensor.part(tp)

    def num_bytes_on(self, tp: TensorParallel, dtype: torch.dtype) -> int:
        """Return the size of this rank's weights in a model of `dtype`."""
        return sum(tensor.num_bytes_on(tp, dtype) for tensor in self.tensors)


def decoder(config: ModelConfig, layers: Sequence[Declared[DecoderLayer]]) -> DeclaredModel:
    # old checkpoints have the buffers of their rotation, and some a second copy of a tied head
    redundant = (".rotary_emb.inv_freq", *(("lm_head.weight",) if config.tie_word_embeddings else ()))
    return DeclaredModel(config=config, vocab=embedding_and_head(config), layers=tuple(layers), redundant=redundant)
