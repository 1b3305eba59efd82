"""The choice of an attention backend by name, and by "auto"."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvist.attention import build_attention, choose_attention, fa3, flashinfer
from kvist.errors import ConfigError

CPU = torch.device("cpu")


def test_auto_chooses_torch_on_a_cpu_with_a_reason() -> None:
    choice = choose_attention("auto", CPU, torch.bfloat16)
    assert choice.name == "torch"
    assert "cpu" in choice.reason
    assert build_attention(choice.name, CPU).name == "torch"


@pytest.mark.parametrize("name", ["fa3", "flashinfer"])
def test_gpu_backends_on_a_cpu_are_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} needs .* GPU, and the device is cpu: use auto"):
        choose_attention(name, CPU, torch.bfloat16)


def test_an_unknown_backend_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match="is unknown; use auto, fa3, flashinfer, torch"):
        choose_attention("flash", CPU, torch.float32)
    with pytest.raises(ConfigError, match="is unknown; use auto, fa3, flashinfer, torch"):
        build_attention("flash", CPU)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, set[str]], torch.device]:
    """Return a function that simulates a GPU of a generation, and the libraries installed for it."""

    def simulate(generation: int, installed: set[str]) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (generation, 0))
        for file in (fa3, flashinfer):
            monkeypatch.setattr(file, "find_spec", lambda module: True if module in installed else None)
        return torch.device("cuda")

    return simulate


@pytest.mark.parametrize(
    ("generation", "installed", "name", "reason"),
    [
        (9, {"flash_attn_interface", "flashinfer"}, "fa3", "FlashAttention-3"),
        (9, {"flashinfer"}, "flashinfer", "fa3 is not installed (pip install tokenspeed-fa3"),
        (8, {"flash_attn_interface", "flashinfer"}, "flashinfer", "fa3 needs a Hopper GPU"),
        (10, {"flash_attn_interface"}, "torch", "pip install 'flashinfer-python"),
        (7, {"flashinfer"}, "torch", "flashinfer needs an Ampere or newer NVIDIA GPU"),
    ],
)
def test_auto_on_a_gpu_chooses_the_fastest_backend_that_runs_and_says_why_faster_ones_do_not(
    gpu: Callable[[int, set[str]], torch.device], generation: int, installed: set[str], name: str, reason: str
) -> None:
    choice = choose_attention("auto", gpu(generation, installed), torch.bfloat16)
    assert choice.name == name
    assert reason in choice.reason


def test_auto_chooses_torch_for_float32_on_a_gpu_with_a_reason(
    gpu: Callable[[int, set[str]], torch.device],
) -> None:
    choice = choose_attention("auto", gpu(9, {"flash_attn_interface", "flashinfer"}), torch.float32)
    assert choice.name == "torch"
    assert "float32" in choice.reason


def test_a_named_backend_without_its_library_or_with_the_wrong_dtype_is_refused(
    gpu: Callable[[int, set[str]], torch.device],
) -> None:
    assert choose_attention("fa3", gpu(9, {"flash_attn_interface"}), torch.bfloat16).name == "fa3"
    with pytest.raises(ConfigError, match=r"fa3 needs bfloat16 or float16, and the dtype is torch\.float32: use auto"):
        choose_attention("fa3", gpu(9, {"flash_attn_interface"}), torch.float32)
    with pytest.raises(ConfigError, match=r"flashinfer is not installed \(pip install"):
        choose_attention("flashinfer", gpu(9, set()), torch.bfloat16)


@pytest.mark.gpu
def test_auto_on_hopper_in_16_bits_chooses_fa3() -> None:
    pytest.importorskip("flash_attn_interface")
    choice = choose_attention("auto", torch.device("cuda"), torch.bfloat16)
    assert choice.name == "fa3"
    assert "FlashAttention-3" in choice.reason
