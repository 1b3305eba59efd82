"""The choice of an attention backend by name, and by "auto"."""

from __future__ import annotations

import pytest
import torch

from kvist.attention import build_attention, choose_attention
from kvist.errors import ConfigError

CPU = torch.device("cpu")


def test_auto_chooses_torch_on_a_cpu_with_a_reason() -> None:
    choice = choose_attention("auto", CPU, torch.bfloat16)
    assert choice.name == "torch"
    assert "cpu" in choice.reason
    assert build_attention(choice.name, CPU).name == "torch"


def test_auto_chooses_torch_for_float32_on_a_gpu_with_a_reason() -> None:
    choice = choose_attention("auto", torch.device("cuda"), torch.float32)
    assert choice.name == "torch"
    assert "float32" in choice.reason


def test_a_named_backend_is_chosen_unchanged() -> None:
    assert choose_attention("fa3", CPU, torch.float32).name == "fa3"


@pytest.mark.parametrize("name", ["fa3", "flashinfer"])
def test_gpu_backends_on_a_cpu_are_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} needs .* GPU, and the device is cpu: use auto"):
        build_attention(name, CPU)


def test_an_unknown_backend_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match="is unknown; use auto, torch, fa3, flashinfer"):
        choose_attention("flash", CPU, torch.float32)
    with pytest.raises(ConfigError, match="is unknown; use auto, torch, fa3, flashinfer"):
        build_attention("flash", CPU)


@pytest.mark.parametrize(
    ("generation", "installed", "name", "reason"),
    [
        (9, {"flash_attn_interface", "flashinfer"}, "fa3", "FlashAttention-3"),
        (9, {"flashinfer"}, "flashinfer", "fastest installed"),
        (8, {"flash_attn_interface", "flashinfer"}, "flashinfer", "fastest installed"),
        (10, {"flash_attn_interface"}, "torch", "pip install 'flashinfer-python"),
        (7, {"flashinfer"}, "torch", "do not run on"),
    ],
)
def test_auto_on_a_gpu_chooses_the_fastest_installed_backend(
    monkeypatch: pytest.MonkeyPatch, generation: int, installed: set[str], name: str, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (generation, 0))
    monkeypatch.setattr("kvist.attention.find_spec", lambda module: True if module in installed else None)
    choice = choose_attention("auto", torch.device("cuda"), torch.bfloat16)
    assert choice.name == name
    assert reason in choice.reason


@pytest.mark.gpu
def test_auto_on_hopper_in_16_bits_chooses_fa3() -> None:
    pytest.importorskip("flash_attn_interface")
    choice = choose_attention("auto", torch.device("cuda"), torch.bfloat16)
    assert choice.name == "fa3"
    assert "FlashAttention-3" in choice.reason
