"""Sizes, dummy weights, splits and formats follow from what the layers declare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvist.checkpoint import Checkpoint, find_checkpoint
from kvist.errors import ModelLoadError
from kvist.models import load_model_config
from kvist.models.decoder import CausalLM
from kvist.models.families import FAMILIES
from kvist.models.formats import FORMATS, Weight
from kvist.models.linear import Linear, make_linear
from kvist.models.load import declare_model, load_model
from kvist.models.parallel import TensorParallel
from kvist.models.tensors import DeclaredTensor, Entry, Location, Names, Shards, Whole
from kvist.models.weights import Declared, WeightReader, check_tensors
from kvist.models.weights_dummy import DummySource
from kvist.models.weights_gguf import GgufSource
from kvist.models.weights_safetensors import SafetensorsSource
from tests.models.conftest import WriteModel
from tests.models.tiny_models import logits_of, relative_error

CPU = torch.device("cpu")
FAMILY_CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "num_key_value_heads": 1},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32, "attention_bias": True},
}
WriteModel = WriteModel


def reader_of(source: Any, tp: TensorParallel, dtype: torch.dtype = torch.float32) -> WeightReader:
    return WeightReader(source, dtype=dtype, device=CPU, tp=tp)


def load_parts(checkpoint: Checkpoint, tp: TensorParallel, dtype: torch.dtype) -> WeightReader:
    """Load every layer of a rank, and return the reader that has counted them."""
    declared = declare_model(load_model_config(checkpoint))
    reader = reader_of(SafetensorsSource(checkpoint.path), tp, dtype)
    declared.vocab.load(reader)
    for layer in declared.layers:
        layer.load(reader)
    return reader


def test_every_family_has_a_case() -> None:
    assert FAMILY_CHANGES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILY_CHANGES)
def test_each_rank_loads_exactly_the_declared_tensors_and_bytes(
    write_model: WriteModel, family: str, size: int, dtype: torch.dtype
) -> None:
    checkpoint, _ = write_model(**FAMILY_CHANGES[family])
    declared = declare_model(load_model_config(checkpoint))
    for rank in range(size):
        tp = TensorParallel(rank=rank, size=size)
        reader = load_parts(checkpoint, tp, dtype)
        assert reader.num_read == len(declared.tensors)
        assert reader.num_bytes == declared.num_bytes_on(tp, dtype)


@pytest.mark.parametrize("family", FAMILY_CHANGES)
def test_the_ranks_parts_cover_a_tensor_once_unless_it_is_replicated(write_model: WriteModel, family: str) -> None:
    checkpoint, tensors = write_model(**FAMILY_CHANGES[family])
    source = SafetensorsSource(checkpoint.path)
    for tensor in declare_model(load_model_config(checkpoint)).tensors:
        parts = [reader_of(source, TensorParallel(rank=rank, size=2)).read(tensor) for rank in range(2)]
        whole = tensors[tensor.hf.name]
        split = [axis for axis, length in enumerate(parts[0].shape) if length < whole.shape[axis]]
        if split:
            joined = torch.cat(parts, dim=split[0])
            assert torch.equal(joined[: whole.shape[0]], whole), tensor.hf.name  # the vocabulary is padded
            assert not joined[whole.shape[0] :].any()
        else:
            assert all(torch.equal(part, whole) for part in parts), tensor.hf.name


@pytest.mark.parametrize("family", FAMILY_CHANGES)
def test_dummy_tensors_have_the_names_and_shapes_of_a_checkpoint_by_transformers(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    name = family.capitalize()
    config = getattr(transformers, f"{name}Config")(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=101, tie_word_embeddings=family == "qwen2", attention_bias=True,
    )  # fmt: skip
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(tmp_path)
    real = load_file(tmp_path / "model.safetensors")
    source = DummySource(seed=1, device=CPU)
    tensors = declare_model(load_model_config(find_checkpoint(str(tmp_path)))).tensors
    dummies = {tensor.hf.name: source.read(tensor, tensor.part(TensorParallel())) for tensor in tensors}
    assert {name: values.shape for name, values in dummies.items()} == {name: real[name].shape for name in real}


# ---------------------------------------------------------------- stacked tensors

NUM_EXPERTS = 3


def expert(index: int, *, rows: int = 8, columns: int = 64) -> DeclaredTensor:
    """A matrix that safetensors have by itself and GGUF has in a stack."""
    names = Names(
        hf=Location(f"experts.{index}.up_proj"), gguf=Location("ffn_up_exps", entry=Entry(index, NUM_EXPERTS))
    )
    return names.matrix(Shards(rows, "rows"), Whole(columns))


def write_stack(path: Path, values: Tensor) -> GgufSource:
    writer = gguf.GGUFWriter(path, "llama")
    quantised = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("ffn_up_exps.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufSource(find_checkpoint(str(path)))


def test_a_rank_reads_its_rows_of_one_entry_of_a_stacked_tensor(tmp_path: Path) -> None:
    values = torch.randn(NUM_EXPERTS, 8, 64)
    source = write_stack(tmp_path / "stack.gguf", values)
    kind = gguf.GGMLQuantizationType.Q8_0
    whole = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind), kind))
    check_tensors(source, [expert(index) for index in range(NUM_EXPERTS)], family="moe", redundant=())
    for index in range(NUM_EXPERTS):
        for rank in range(2):
            rows = reader_of(source, TensorParallel(rank=rank, size=2)).read(expert(index))
            assert torch.equal(rows, whole[index, 4 * rank : 4 * rank + 4])


def test_a_stack_of_another_number_of_tensors_is_refused(tmp_path: Path) -> None:
    source = write_stack(tmp_path / "stack.gguf", torch.randn(NUM_EXPERTS + 1, 8, 64))
    with pytest.raises(ModelLoadError, match=r"ffn_up_exps\.weight has shape \(4, 8, 64\).*\(3, 8, 64\)"):
        check_tensors(source, [expert(0)], family="moe", redundant=())


def test_entries_of_a_stack_have_dummy_weights_of_their_own() -> None:
    stacked = [replace(expert(index), hf=Location("up", entry=Entry(index, NUM_EXPERTS))) for index in range(2)]
    source = DummySource(seed=1, device=CPU)
    first, second = (source.read(tensor, tensor.part(TensorParallel())) for tensor in stacked)
    assert not torch.equal(first, second)


def test_an_entry_of_a_stacked_safetensor_is_read(tmp_path: Path) -> None:
    stack = torch.randn(NUM_EXPERTS, 8, 64)
    save_file({"up": stack}, tmp_path / "model.safetensors")
    tensor = replace(expert(2), hf=Location("up", entry=Entry(2, NUM_EXPERTS)))
    part = reader_of(SafetensorsSource(tmp_path), TensorParallel(rank=1, size=2)).read(tensor)
    assert torch.equal(part, stack[2, 4:])


# ---------------------------------------------------------------- a second format


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """8-bit values with a scale for each row."""

    values: Tensor  # [out_features, in_features] int8
    scales: Tensor  # [out_features, 1] fp32

    def joined(self, others: Sequence[Int8Weight]) -> Int8Weight:
        values = [self.values, *(other.values for other in others)]
        return Int8Weight(torch.cat(values), torch.cat([self.scales, *(other.scales for other in others)]))


def int8(matrix: DeclaredTensor) -> Declared[Weight]:
    values = replace(matrix, dtype=torch.int8)
    scales = replace(
        matrix,
        hf=matrix.hf.suffixed("_scale"),
        gguf=matrix.gguf.suffixed("_scale"),
        axes=(matrix.axes[0], Whole(1)),
        dtype=torch.float32,
    )
    return Declared((values, scales), lambda reader: Int8Weight(reader.read(values), reader.read(scales)))


class Int8Linear:
    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        self.weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        product = (x @ self.weight.values.t().to(x.dtype)) * self.weight.scales.t().to(x.dtype)
        return product if self._bias is None else product + self._bias


@make_linear.register
def _(weight: Int8Weight, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None) -> Linear:
    assert out_dtype is None
    return Int8Linear(weight, bias)


def quantise(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of an int8 checkpoint, and plain tensors of the same values."""
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, values in tensors.items():
        if name.endswith("_proj.weight"):
            scales = values.abs().amax(dim=1, keepdim=True) / 127
            quantised = (values / scales).round().to(torch.int8)
            stored |= {name: quantised, f"{name}_scale": scales}
            plain[name] = quantised.float() * scales
        else:
            stored[name] = plain[name] = values
    return stored, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_format_is_loaded_sized_split_and_multiplied(
    write_model: WriteModel,
    prompt: list[int],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setitem(FORMATS, "int8", int8)
    checkpoint, tensors = write_model(attention_bias=True)
    config = load_model_config(checkpoint)
    stored, plain = quantise(tensors)

    def load(weight_format: str, values: dict[str, Tensor]) -> CausalLM:
        save_file(values, checkpoint.path / "model.safetensors")
        own = replace(config, weight_format=weight_format)
        return load_model(checkpoint, own, dtype=dtype, device=CPU, tp=TensorParallel())

    wanted = logits_of(load("plain", plain), prompt)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    assert relative_error(logits_of(load("int8", stored), prompt), wanted) < tolerance
    declared = declare_model(replace(config, weight_format="int8"))
    layer, source = declared.layers[0], SafetensorsSource(checkpoint.path)
    for size in (1, 2):
        sizes = set()
        for rank in range(size):
            reader = reader_of(source, TensorParallel(rank=rank, size=size), dtype)
            layer.load(reader)
            assert reader.num_bytes == sum(tensor.num_bytes_on(reader.tp, dtype) for tensor in layer.tensors)
            sizes.add(reader.num_bytes)
        assert len(sizes) == 1
    whole, half = (declared.num_bytes_on(TensorParallel(size=size), dtype) for size in (1, 2))
    assert half < 0.6 * whole
    assert whole < declare_model(config).num_bytes_on(TensorParallel(), dtype)


def test_values_of_another_dtype_than_the_formats_are_refused(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "int8", int8)
    checkpoint, tensors = write_model()
    config = replace(load_model_config(checkpoint), weight_format="int8")
    stored, _ = quantise(tensors)
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(stored | {name: stored[name].short()}, checkpoint.path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=rf"{name} has dtype int16"):
        load_model(checkpoint, config, dtype=torch.float32, device=CPU, tp=TensorParallel())


def test_a_format_without_a_product_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="no product is registered for Odd"):
        make_linear(type("Odd", (), {})())
