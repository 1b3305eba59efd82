"""Fixtures that several rooms share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings

from kvist.checkpoint import find_checkpoint

# How long one example takes is a matter of the machine and of what else runs on it.
settings.register_profile("kvist", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvist")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are reported as skipped where there is none; `pytest -m gpu` runs them."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def configuration_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that tests start keep their cluster key here, not in the developer's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="session")
def transformers_smollm2() -> Any:
    """transformers' own reading of the embedded SmolLM2 GGUF, fp32: some ten seconds, once a session."""
    import gguf
    import torch
    import transformers

    path = find_checkpoint(None).path
    # It parses the file twice, and makes the map of names anew for each tensor: half of the time.
    with (
        mock.patch("gguf.GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch("gguf.get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
