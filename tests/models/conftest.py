"""Fixtures around the tiny checkpoints of `tiny_models`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvist.checkpoint import Checkpoint
from kvist.models.decoder import CausalLM
from tests.models.tiny_models import hf_checkpoint, load, random_tensors, run_model, write_folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Checkpoint]:
    return lambda **changes: write_folder(tmp_path, **changes)


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., tuple[Checkpoint, dict[str, Tensor]]]:
    """Write a folder with config.json and model.safetensors; return it and its tensors."""

    def write(**changes: Any) -> tuple[Checkpoint, dict[str, Tensor]]:
        checkpoint = write_folder(tmp_path, **changes)
        tensors = random_tensors(checkpoint)
        save_file(tensors, checkpoint.path / "model.safetensors")
        return checkpoint, tensors

    return write


@pytest.fixture
def write_tiny_in() -> Callable[..., Checkpoint]:
    """Write the same to a given folder."""

    def write(folder: Path, **changes: Any) -> Checkpoint:
        checkpoint = write_folder(folder, **changes)
        save_file(random_tensors(checkpoint), folder / "model.safetensors")
        return checkpoint

    return write


@pytest.fixture
def logits_of() -> Callable[..., Tensor]:
    return run_model


@pytest.fixture
def load_tiny() -> Callable[..., CausalLM]:
    return load


@pytest.fixture
def as_hf() -> Callable[[Path], Checkpoint]:
    return hf_checkpoint


@pytest.fixture
def prompt() -> list[int]:
    return torch.randint(0, 101, (23,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Return the largest difference divided by the largest value."""
    return lambda ours, theirs: float((ours - theirs).abs().max() / theirs.abs().max())
