"""Fixtures shared by all tests."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings

from kvist.checkpoint import find_checkpoint

# No deadline: the time of one example depends on the machine and on its load.
settings.register_profile("kvist", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvist")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on machines without a GPU; `pytest -m gpu` selects them."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def configuration_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set a temporary configuration folder: processes of tests must not use the developer's cluster key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="session")
def transformers_smollm2() -> Any:
    """The embedded SmolLM2 GGUF as loaded by transformers, in fp32. Takes about ten seconds, once per session."""
    import gguf
    import torch
    import transformers

    path = find_checkpoint(None).path
    # transformers parses the file twice and rebuilds the map of names for each tensor, which takes half of the time.
    with (
        mock.patch("gguf.GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch("gguf.get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.fixture
def as_unprivileged_user() -> Iterator[None]:
    """Run the test as an unprivileged user, because root may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    if user == 0:
        os.seteuid(0)
