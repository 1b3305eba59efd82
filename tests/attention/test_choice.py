"""Which backend a name gives."""

from __future__ import annotations

import pytest
import torch

from kvist.attention import build_attention, choose_attention
from kvist.errors import ConfigError

CPU = torch.device("cpu")


def test_auto_is_torch_on_a_cpu_and_says_why() -> None:
    choice = choose_attention("auto", CPU, torch.bfloat16)
    assert choice.name == "torch"
    assert "cpu" in choice.reason
    assert build_attention(choice.name, CPU).name == "torch"


def test_auto_is_torch_for_float32_on_a_gpu_and_says_why() -> None:
    choice = choose_attention("auto", torch.device("cuda"), torch.float32)
    assert choice.name == "torch"
    assert "float32" in choice.reason


def test_a_named_backend_is_taken_as_it_is() -> None:
    assert choose_attention("fa3", CPU, torch.float32).name == "fa3"


@pytest.mark.parametrize("name", ["fa3", "flashinfer"])
def test_gpu_backends_on_a_cpu_are_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} needs .* GPU, and this is cpu: use auto"):
        build_attention(name, CPU)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known are auto, torch, fa3, flashinfer"):
        choose_attention("flash", CPU, torch.float32)
    with pytest.raises(ConfigError, match="known are auto, torch, fa3, flashinfer"):
        build_attention("flash", CPU)


@pytest.mark.gpu
def test_auto_on_hopper_in_16_bits_is_fa3() -> None:
    pytest.importorskip("flash_attn_interface")
    choice = choose_attention("auto", torch.device("cuda"), torch.bfloat16)
    assert choice.name == "fa3"
    assert "FlashAttention-3" in choice.reason
