"""Which backend a name gives."""

from __future__ import annotations

import pytest
import torch

from kvist.attention import build_attention
from kvist.errors import ConfigError

CPU = torch.device("cpu")


def test_auto_is_torch_and_says_so() -> None:
    assert build_attention("auto", CPU).name == "torch"
    assert build_attention("torch", CPU).name == "torch"


@pytest.mark.parametrize("name", ["fa3", "flashinfer"])
def test_gpu_backends_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match="comes with the GPU engine"):
        build_attention(name, CPU)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known are auto, torch"):
        build_attention("flash", CPU)
