"""Attention over the page pool: one file per backend, chosen by name here. backend.py has the interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvist.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from kvist.attention.backend import AttentionBackend


def _torch(device: torch.device) -> AttentionBackend:
    from kvist.attention.torch_reference import TorchAttention

    return TorchAttention(device)


def _fa3(device: torch.device) -> AttentionBackend:
    from kvist.attention.fa3 import Fa3Attention

    return Fa3Attention(device)


def _flashinfer(device: torch.device) -> AttentionBackend:
    from kvist.attention.flashinfer import FlashInferAttention

    return FlashInferAttention(device)


_BACKENDS: dict[str, Callable[[torch.device], AttentionBackend]] = {
    "torch": _torch,
    "fa3": _fa3,
    "flashinfer": _flashinfer,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionChoice:
    name: str
    reason: str  # for the log


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> AttentionChoice:
    """Choose the backend that `--attention-backend` names; "auto" chooses the fastest installed backend for this device
    and dtype. Raises `ConfigError` for an unknown name."""
    if name != "auto":
        _check_name(name)
        return AttentionChoice(name=name, reason="set by --attention-backend")
    if device.type != "cuda":
        return AttentionChoice(name="torch", reason=f"the only backend for {device.type}")
    if dtype.itemsize != 2:
        return AttentionChoice(
            name="torch", reason=f"fa3 and flashinfer support 16-bit types only, and the dtype is {dtype}"
        )
    return _choose_for_gpu(device)


def _choose_for_gpu(device: torch.device) -> AttentionChoice:
    import torch

    from kvist.attention.fa3 import REMEDY as FA3_REMEDY
    from kvist.attention.flashinfer import REMEDY as FLASHINFER_REMEDY

    gpu, generation = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)[0]
    is_hopper = generation == 9
    if generation < 8:
        return AttentionChoice(name="torch", reason=f"slow, but fa3 and flashinfer do not run on {gpu}")
    if is_hopper and find_spec("flash_attn_interface") is not None:
        return AttentionChoice(name="fa3", reason=f"FlashAttention-3 is the fastest on {gpu}")
    if find_spec("flashinfer") is not None:
        return AttentionChoice(name="flashinfer", reason=f"FlashInfer is the fastest installed backend for {gpu}")
    remedy = FA3_REMEDY if is_hopper else FLASHINFER_REMEDY
    return AttentionChoice(
        name="torch", reason=f"slow: no faster backend is installed for {gpu}; install one with: {remedy}"
    )


def _check_name(name: str) -> None:
    if name not in _BACKENDS:
        raise ConfigError(
            f"--attention-backend {name} is unknown; use auto, {', '.join(_BACKENDS)}", param="attention_backend"
        )


def build_attention(name: str, device: torch.device) -> AttentionBackend:
    """Make the backend `name` (not "auto") for tensors on `device`. Raises `ConfigError` with a remedy when the backend
    cannot run here."""
    _check_name(name)
    return _BACKENDS[name](device)
