"""A tiny llama with random weights, and an engine stepped by the test around a runner: it allocates pages, has no
scheduler."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvist.checkpoint import Checkpoint, find_checkpoint
from tests.runner.hand_driven import HandDriven, PlainEngine, make_plain_runner


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)  # the tensors are tiny, and other tests need the cores


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiny-llama")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 211,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return find_checkpoint(str(folder))


@pytest.fixture
def engine(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Iterator[PlainEngine]:
    runner = make_plain_runner(tiny_checkpoint, tmp_path)
    yield HandDriven(runner)
    runner.close()


@pytest.fixture
def fresh_engine(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Iterator[PlainEngine]:
    """Return another engine with the same weights and empty pages."""
    runner = make_plain_runner(tiny_checkpoint, tmp_path / "other")
    yield HandDriven(runner)
    runner.close()
