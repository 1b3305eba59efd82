"""A GGUF file and a safetensors folder with the same weights give the same model. The tests write the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from torch import Tensor

from kvist.checkpoint import Checkpoint, find_checkpoint
from kvist.errors import ModelLoadError
from kvist.models import ModelConfig, load_model_config
from kvist.models.config import DividedRope, LinearRope
from kvist.models.rope import inverse_frequencies
from tests.models.conftest import WriteModel
from tests.models.tiny_models import load_tiny, logits_of, relative_error

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
}


Array = npt.NDArray[Any]
WriteGguf = Callable[..., tuple[Checkpoint, dict[str, Tensor], Checkpoint]]


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def interleave(values: Array, num_heads: int) -> Array:
    """Reorder halves to pairs as llama.cpp's converter does: row 2i is i, row 2i+1 is D/2 + i."""
    heads = values.reshape(num_heads, -1, *values.shape[1:])
    half = heads.shape[1] // 2
    out = np.empty_like(heads)
    out[:, 0::2], out[:, 1::2] = heads[:, :half], heads[:, half:]
    return out.reshape(values.shape)


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    *,
    kind: Kind = Kind.F32,
    extra: dict[str, Array] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Checkpoint:
    writer = gguf.GGUFWriter(path, config.family)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_eos_token_id(2)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 5)
    writer.add_bos_token_id(1)
    for key, value in (metadata or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if config.family == "llama" and ".q_proj." in name:
            values = interleave(values, config.num_heads)
        if config.family == "llama" and ".k_proj." in name:
            values = interleave(values, config.num_kv_heads)
        if kind is not Kind.F32 and values.ndim > 1:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return find_checkpoint(str(path))


@pytest.fixture
def tiny_gguf(write_model: WriteModel, tmp_path: Path) -> WriteGguf:
    def write(
        changes: dict[str, Any] | None = None, **options: Any
    ) -> tuple[Checkpoint, dict[str, Tensor], Checkpoint]:
        folder, tensors = write_model(**(changes or {}))
        config = load_model_config(folder)
        return folder, tensors, write_gguf(tmp_path / "tiny.gguf", config, tensors, **options)

    return write


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_gives_the_logits_of_its_safetensors(tiny_gguf: WriteGguf, prompt: list[int], family: str) -> None:
    folder, _, file = tiny_gguf(FAMILIES[family])
    assert torch.equal(logits_of(load_tiny(file), prompt), logits_of(load_tiny(folder), prompt))


def test_gguf_metadata_gives_the_same_config_and_every_end_token(tiny_gguf: WriteGguf) -> None:
    folder, _, file = tiny_gguf(FAMILIES["qwen3"])
    ours, theirs = load_model_config(file), load_model_config(folder)
    assert ours.eos_token_ids == (2, 5)
    assert ours.rms_norm_eps == pytest.approx(theirs.rms_norm_eps)
    for field in ("head_dim", "num_kv_heads", "vocab_size", "tie_word_embeddings", "attention_bias", "rope_theta"):
        assert getattr(ours, field) == getattr(theirs, field), field


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1, Kind.F16, Kind.BF16])
def test_quantised_tensors_equal_the_gguf_library(tiny_gguf: WriteGguf, prompt: list[int], kind: Kind) -> None:
    folder, tensors, file = tiny_gguf(kind=kind)
    rounded = {
        name: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind), kind))
        if value.ndim > 1
        else value
        for name, value in tensors.items()
    }
    save_file(rounded, folder.path / "model.safetensors")
    assert torch.equal(logits_of(load_tiny(file), prompt), logits_of(load_tiny(folder), prompt))


def test_rope_divisors_of_a_gguf_equal_the_llama3_scaling(tiny_gguf: WriteGguf, prompt: list[int]) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    folder, tensors, _ = tiny_gguf({"rope_scaling": scaling})
    config = load_model_config(folder)
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    divisors = (plain / inverse_frequencies(config)).numpy().astype(np.float32)
    file = write_gguf(folder.path / "scaled.gguf", config, tensors, extra={"rope_freqs.weight": divisors})
    assert load_model_config(file).rope_scaling == DividedRope(divisors=tuple(divisors.tolist()))
    assert relative_error(logits_of(load_tiny(file), prompt), logits_of(load_tiny(folder), prompt)) < 1e-5


def test_linear_rope_scaling_of_a_gguf_is_read(write_model: WriteModel, tmp_path: Path) -> None:
    folder, tensors = write_model()
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4}
    file = write_gguf(tmp_path / "tiny.gguf", load_model_config(folder), tensors, metadata=metadata)
    assert load_model_config(file).rope_scaling == LinearRope(factor=4.0)


def test_yarn_of_a_gguf_equals_that_of_a_folder(write_model: WriteModel, tmp_path: Path) -> None:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    folder, tensors = write_model(rope_scaling=rope)
    metadata = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4,
        "llama.rope.scaling.original_context_length": 64,
    }
    file = write_gguf(tmp_path / "tiny.gguf", load_model_config(folder), tensors, metadata=metadata)
    assert load_model_config(file).rope_scaling == load_model_config(folder).rope_scaling


@pytest.mark.parametrize(
    ("field", "metadata"),
    [
        ("llama.rope.scaling.type", {"llama.rope.scaling.type": "longrope"}),
        ("llama.expert_count", {"llama.expert_count": 8}),
        ("llama.attention.sliding_window", {"llama.attention.sliding_window": 4096}),
        ("llama.rope.dimension_count", {"llama.rope.dimension_count": 8}),
    ],
)
def test_unsupported_gguf_features_are_refused_by_name(
    tiny_gguf: WriteGguf, field: str, metadata: dict[str, Any]
) -> None:
    _, _, file = tiny_gguf(metadata=metadata)
    with pytest.raises(ModelLoadError, match=field.replace(".", "[.]")):
        load_model_config(file)


def test_unknown_gguf_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match=r"general\.architecture is 'gpt2'"):
        load_model_config(find_checkpoint(str(path)))


def test_a_truncated_gguf_names_the_tensor(tiny_gguf: WriteGguf) -> None:
    _, _, file = tiny_gguf()
    file.path.write_bytes(file.path.read_bytes()[:-4096])
    with pytest.raises(ModelLoadError, match="the file ends inside tensor"):
        load_tiny(file)


def test_an_unknown_gguf_tensor_is_named(tiny_gguf: WriteGguf) -> None:
    _, _, file = tiny_gguf(extra={"blk.0.attn_sinks.weight": np.zeros(4, dtype=np.float32)})
    with pytest.raises(
        ModelLoadError, match=r"tiny\.gguf: tensor blk\.0\.attn_sinks\.weight is not part of a llama model"
    ):
        load_tiny(file)


def test_a_missing_gguf_tensor_is_named_as_in_the_file(write_model: WriteModel, tmp_path: Path) -> None:
    folder, tensors = write_model()
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    file = write_gguf(tmp_path / "tiny.gguf", load_model_config(folder), tensors)
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf: tensor blk\.1\.attn_output\.weight is missing"):
        load_tiny(file)


def test_a_misshaped_gguf_tensor_is_named_as_in_the_file(write_model: WriteModel, tmp_path: Path) -> None:
    folder, tensors = write_model()
    tensors["model.norm.weight"] = torch.zeros(63)
    file = write_gguf(tmp_path / "tiny.gguf", load_model_config(folder), tensors)
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf: tensor output_norm\.weight has shape \(63,\).*\(64,\)"):
        load_tiny(file)


def test_the_header_of_a_checkpoint_is_read_once(tiny_gguf: WriteGguf) -> None:
    _, _, file = tiny_gguf()
    config = load_model_config(file)
    file.path.unlink()
    assert load_model_config(file) == config
