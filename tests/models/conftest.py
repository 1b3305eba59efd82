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
from tests.models.tiny_models import random_tensors, write_folder

WriteConfig = Callable[..., Checkpoint]
WriteModel = Callable[..., tuple[Checkpoint, dict[str, Tensor]]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    return lambda **changes: write_folder(tmp_path, **changes)


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """Write a folder with config.json and model.safetensors; return it and its tensors."""

    def write(**changes: Any) -> tuple[Checkpoint, dict[str, Tensor]]:
        checkpoint = write_folder(tmp_path, **changes)
        tensors = random_tensors(checkpoint)
        save_file(tensors, checkpoint.path / "model.safetensors")
        return checkpoint, tensors

    return write


@pytest.fixture
def prompt() -> list[int]:
    return torch.randint(0, 101, (23,), generator=torch.Generator().manual_seed(3)).tolist()
