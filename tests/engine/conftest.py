"""A cluster of engines with the tiny model, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

import pytest
import torch

from kvist.models.decoder import CausalLM
from kvist.request import EngineRequest
from kvist.testing.memory_cluster import MemoryCluster
from kvist.testing.specs import RequestFields, make_request
from kvist.testing.tiny_model import load_tiny_model, write_tiny_model


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny_model_path: Path) -> CausalLM:
    torch.set_num_threads(1)
    return load_tiny_model(tiny_model_path)


@pytest.fixture(params=[False, True], ids=["", "overlap"])
def world(tiny_model: CausalLM, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MemoryCluster]:
    made = MemoryCluster(tiny_model, tmp_path.resolve(), overlap=request.param)
    yield made
    made.close()


def request_of(request_id: str, prompt: tuple[int, ...], **fields: Unpack[RequestFields]) -> EngineRequest:
    """Return a greedy request of 12 tokens with these changes."""
    defaults: RequestFields = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    defaults.update(fields)
    return make_request(request_id, prompt, **defaults)
