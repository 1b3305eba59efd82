"""Attention over the page pool: one file a backend, chosen by name here. The door is backend.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvist.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from kvist.attention.backend import AttentionBackend

_COMING_WITH_GPU_ENGINE = ("fa3", "flashinfer")


def _torch(device: torch.device) -> AttentionBackend:
    from kvist.attention.torch_reference import TorchAttention

    return TorchAttention(device)


_BACKENDS: dict[str, Callable[[torch.device], AttentionBackend]] = {"torch": _torch}


def resolve_attention(name: str) -> str:
    """The backend that `--attention-backend` names; "auto" takes the best one there is. Raises `ConfigError`."""
    if name == "auto":
        return "torch"
    if name in _COMING_WITH_GPU_ENGINE:
        raise ConfigError(
            f"--attention-backend {name} comes with the GPU engine and is not in this version: use torch or auto",
            param="attention_backend",
        )
    if name not in _BACKENDS:
        raise ConfigError(
            f"--attention-backend {name}: known are auto, {', '.join(_BACKENDS)}", param="attention_backend"
        )
    return name


def build_attention(name: str, device: torch.device) -> AttentionBackend:
    """The backend of that name for tensors on `device`; its `.name` says what "auto" became. Raises `ConfigError`."""
    return _BACKENDS[resolve_attention(name)](device)
