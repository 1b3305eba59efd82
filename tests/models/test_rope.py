"""Frequencies equal those of transformers for every kind of rope scaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.models import load_model_config
from kvist.models.rope import inverse_frequencies, rotation_scale

BASE = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 512,
    "num_attention_heads": 4,
    "intermediate_size": 8,
    "vocab_size": 16,
    "max_position_embeddings": 4096,
}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.model
@pytest.mark.parametrize(
    "rope",
    [
        YARN,
        YARN | {"original_max_position_embeddings": 1024},
        YARN | {"beta_fast": 16, "beta_slow": 2},
        YARN | {"attention_factor": 0.9},
        YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "factor": 40.0},
        YARN | {"truncate": False, "factor": 32.0},
        YARN | {"factor": 1.0},
        YARN | {"rope_theta": 1e6, "original_max_position_embeddings": 32768},
        YARN | {"beta_fast": 1e4, "beta_slow": 1e4},  # both ends of the blend are dimension 0
        {"rope_type": "linear", "factor": 3.0},
    ],
    ids=str,
)
def test_frequencies_and_scale_equal_transformers(tmp_path: Path, rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config: dict[str, Any] = {**BASE, "rope_parameters": {"rope_theta": 1e4, **rope}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load_model_config(Checkpoint(path=tmp_path, kind=CheckpointKind.HF, name="m"))
    theirs = LlamaConfig(**{name: value for name, value in config.items() if name != "model_type"})
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(ours), frequencies, rtol=1e-6, atol=0)
    assert rotation_scale(ours) == pytest.approx(scale, rel=1e-12)
