"""Tiny checkpoints without transformers, and a minimal K/V cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.kernels.operands import Rotary
from kvist.kernels.rotary import rotated_heads
from kvist.models import load_model_config
from kvist.models.decoder import CausalLM
from kvist.models.load import declare_model, load_model
from kvist.models.parallel import TensorParallel
from kvist.models.tensors import Fill
from kvist.models.weights_dummy import DummySource

CPU = torch.device("cpu")
ALONE = TensorParallel()

TINY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 101,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class ContiguousCache:
    """The K and V of one request; `attend` is causal attention by definition, in float64."""

    def __init__(self, num_kv_heads: int) -> None:
        self.num_kv_heads = num_kv_heads
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def attend(self, layer: int, heads: Tensor, rotary: Rotary | None) -> Tensor:
        q, k, v = rotated_heads(heads, rotary, self.num_kv_heads)
        if layer in self.keys:
            k, v = torch.cat((self.keys[layer], k)), torch.cat((self.values[layer], v))
        self.keys[layer], self.values[layer] = k, v
        group = q.shape[1] // k.shape[1]
        keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * q.shape[-1] ** -0.5
        offset = k.shape[0] - q.shape[0]
        future = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).triu(offset + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


def logits_of(
    model: CausalLM, token_ids: list[int], chunks: list[int] | None = None, tp: TensorParallel = ALONE
) -> Tensor:
    """Return logits [num_tokens, vocab_size] of one prompt, computed in chunks of the given sizes over one cache."""
    heads = tp.kv_heads(model.config.num_kv_heads)
    cache, rows, start = ContiguousCache(heads.stop - heads.start), [], 0
    with torch.inference_mode():
        for size in chunks or [len(token_ids)]:
            ids = torch.tensor(token_ids[start : start + size])
            hidden = model.forward(ids, torch.arange(start, start + size), cache.attend)
            rows.append(model.logits(hidden))
            start += size
    assert start == len(token_ids), "the chunks must cover the prompt"
    return torch.cat(rows)


def load_tiny(checkpoint: Checkpoint, **options: Any) -> CausalLM:
    defaults: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "tp": ALONE}
    return load_model(checkpoint, load_model_config(checkpoint), **(defaults | options))


def hf_checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(path=folder, kind=CheckpointKind.HF, name="tiny")


def random_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return random values for every tensor of the config, including norms, so that a swapped norm is detected."""
    source = DummySource(seed=7, device=CPU)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for tensor in declare_model(load_model_config(checkpoint)).tensors:
        if tensor.fill is Fill.ONES:
            values = 1 + 0.2 * torch.randn(tensor.shape, generator=generator)
        else:
            values = source.read(tensor, tensor.part(ALONE)).contiguous()
        tensors[tensor.hf.name] = values
    return tensors


def write_folder(folder: Path, **changes: Any) -> Checkpoint:
    """Write a folder with config.json: TINY with changes; a change to None removes the field."""
    folder.mkdir(exist_ok=True)
    fields = {name: value for name, value in (TINY | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    return hf_checkpoint(folder)


def write_tiny_in(folder: Path, **changes: Any) -> Checkpoint:
    """Write a folder with config.json and model.safetensors."""
    checkpoint = write_folder(folder, **changes)
    save_file(random_tensors(checkpoint), folder / "model.safetensors")
    return checkpoint


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference divided by the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
