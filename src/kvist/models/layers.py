"""The linear layers of a tensor-parallel model: what each declares, and the products that it becomes.

Columns-then-rows, as in Megatron-LM (https://arxiv.org/abs/1909.08053): q, k, v, gate and up are split by output rows;
o and down by input columns, followed by one all-reduce; the vocabulary is split by rows in the embedding and the head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.models.formats import PlainWeight, Weight, WeightFormat
from kvist.models.linear import Linear, make_gated_linear, make_linear
from kvist.models.parallel import TensorParallel
from kvist.models.tensors import DeclaredTensor, PaddedShards
from kvist.models.weights import Declared, WeightReader


def column_parallel(
    matrices: Sequence[DeclaredTensor], biases: Sequence[DeclaredTensor], weight_format: WeightFormat
) -> Declared[Linear]:
    """Declare a linear layer split by output rows; several projections of one input are fused into one product (q+k+v).

    x [T, in_features] -> [T, this rank's rows of all matrices]."""
    weight = _joined(matrices, weight_format)

    def load(reader: WeightReader) -> Linear:
        bias = torch.cat([reader.read(part) for part in biases]) if biases else None
        return make_linear(weight.load(reader), bias)

    return Declared((*weight.tensors, *biases), load)


def gated_parallel(gate: DeclaredTensor, up: DeclaredTensor, weight_format: WeightFormat) -> Declared[Linear]:
    """Declare gate and up, split by output rows.

    x [T, in_features] -> SiLU(gate) * up [T, this rank's rows of gate]."""
    weight = _joined((gate, up), weight_format)
    return Declared(weight.tensors, lambda reader: make_gated_linear(weight.load(reader)))


def _joined(matrices: Sequence[DeclaredTensor], weight_format: WeightFormat) -> Declared[Weight]:
    weights = [weight_format(matrix) for matrix in matrices]

    def load(reader: WeightReader) -> Weight:
        first, *others = [weight.load(reader) for weight in weights]
        return first.joined(others)

    return Declared(tuple(tensor for weight in weights for tensor in weight.tensors), load)


class RowParallelLinear:
    """A linear layer split by input columns; the partial products are summed over ranks."""

    def __init__(self, linear: Linear, tp: TensorParallel) -> None:
        self._linear = linear
        self._tp = tp

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, this rank's columns] -> [T, out_features], the same on every rank."""
        return self._tp.all_reduce(self._linear(x))


def row_parallel(matrix: DeclaredTensor, bias: DeclaredTensor | None, weight_format: WeightFormat) -> Declared[Linear]:
    """Declare a linear layer split by input columns. x [T, this rank's columns] -> [T, out_features]."""
    weight = weight_format(matrix)

    def load(reader: WeightReader) -> Linear:
        # the bias is added once to the sum, so only rank 0 adds it
        values = None if bias is None else reader.read(bias)
        linear = make_linear(weight.load(reader), values if reader.tp.rank == 0 else None)
        return RowParallelLinear(linear, reader.tp)

    return Declared(weight.tensors if bias is None else (*weight.tensors, bias), load)


class VocabParallelEmbedding:
    def __init__(self, weight: Tensor, vocabulary: PaddedShards, tp: TensorParallel) -> None:
        self._weight = weight  # [this rank's tokens, hidden_size]
        self._own = vocabulary.part(tp)
        self._tp = tp

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int64 -> [T, hidden_size]."""
        if self._tp.size == 1:
            return F.embedding(token_ids, self._weight)
        foreign = (token_ids < self._own.start) | (token_ids >= self._own.stop)
        local_ids = (token_ids - self._own.start).masked_fill(foreign, 0)
        rows = F.embedding(local_ids, self._weight).masked_fill(foreign.unsqueeze(1), 0.0)
        return self._tp.all_reduce(rows)


class VocabParallelHead:
    def __init__(self, weight: Tensor, vocab_size: int, tp: TensorParallel) -> None:
        self._linear = make_linear(PlainWeight(weight), out_dtype=torch.float32)
        self._vocab_size = vocab_size
        self._tp = tp

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size] -> logits [R, vocab_size] fp32, complete on every rank."""
        return self._tp.all_gather(self._linear(hidden))[:, : self._vocab_size].float()
