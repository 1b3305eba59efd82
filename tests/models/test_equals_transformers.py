"""Logits of every family equal those of transformers on random tiny models: whole, chunked, after a cached prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny_models import hf_checkpoint, load_tiny, logits_of, relative_error

pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, GQA": ("Llama", {"num_key_value_heads": 2}),
    "llama, MHA, tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama, biased, head_dim": ("Llama", {"num_key_value_heads": 1, "attention_bias": True, "head_dim": 24}),
    "llama, llama3 rope": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3 | {"rope_theta": 500.0}}),
    "llama, linear rope": (
        "Llama",
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
    ),
    "llama, yarn rope": ("Llama", {"num_key_value_heads": 2, "rope_parameters": YARN}),
    "qwen3, yarn rope": (
        "Qwen3",
        {
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False},
        },
    ),
    "qwen2, GQA": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2, MHA, tied": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3, head_dim": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
    "qwen3, biased, tied": (
        "Qwen3",
        {"num_key_value_heads": 2, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
}


SavedModel = tuple[Path, Path, list[int], Tensor]


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name)
def saved_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SavedModel:
    """Return (folder, sharded folder, prompt, transformers' logits) of one random model."""
    transformers = pytest.importorskip("transformers")
    family, options = CASES[request.param]
    config = getattr(transformers, f"{family}Config")(
        num_hidden_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=112,
        vocab_size=131,
        max_position_embeddings=256,
        eos_token_id=2,
        **options,
    )
    torch.manual_seed(5)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers initialises norms to one and biases to zero, which would hide a swapped tensor
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(5)
    folder = tmp_path_factory.mktemp("whole")
    sharded = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder)
    model.save_pretrained(sharded, max_shard_size="60KB")
    prompt = torch.randint(0, 131, (61,)).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0]
    return folder, sharded, prompt, logits


def test_a_whole_prompt_gives_the_logits_of_transformers(saved_model: SavedModel) -> None:
    folder, _, prompt, expected = saved_model
    assert relative_error(logits_of(load_tiny(hf_checkpoint(folder)), prompt), expected) < 1e-4


def test_a_chunked_prompt_gives_the_logits_of_transformers(saved_model: SavedModel) -> None:
    folder, _, prompt, expected = saved_model
    assert relative_error(logits_of(load_tiny(hf_checkpoint(folder)), prompt, [16, 1, 27, 17]), expected) < 1e-4


def test_decoding_after_a_cached_prefix_gives_the_logits_of_transformers(saved_model: SavedModel) -> None:
    folder, _, prompt, expected = saved_model
    assert relative_error(logits_of(load_tiny(hf_checkpoint(folder)), prompt, [48] + [1] * 13), expected) < 1e-4


def test_a_sharded_folder_gives_the_same_logits(saved_model: SavedModel) -> None:
    folder, sharded, prompt, _ = saved_model
    assert not (sharded / "model.safetensors").exists()
    ours = [logits_of(load_tiny(hf_checkpoint(path)), prompt) for path in (folder, sharded)]
    assert torch.equal(ours[0], ours[1])
