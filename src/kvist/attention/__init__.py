"""Attention over the page pool: one file per backend, and one row here. backend.py has the interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvist.door import Door, Given, backend
from kvist.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from kvist.attention.backend import AttentionBackend, AttentionKind


def _fa3() -> AttentionKind:
    from kvist.attention.fa3 import FA3

    return FA3


def _flashinfer() -> AttentionKind:
    from kvist.attention.flashinfer import FLASHINFER

    return FLASHINFER


def _torch() -> AttentionKind:
    from kvist.attention.torch_reference import TORCH

    return TORCH


ATTENTION: Door[[], AttentionKind] = {  # the fastest first: "auto" takes the first that runs
    "fa3": backend(_fa3, text="FlashAttention-3, for Hopper GPUs in 16 bits"),
    "flashinfer": backend(_flashinfer, text="FlashInfer, for Ampere and newer NVIDIA GPUs in 16 bits"),
    "torch": backend(_torch, text="plain PyTorch, for every device and dtype"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionChoice:
    name: str
    reason: str  # for the log


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, given: Given | None = None
) -> AttentionChoice:
    """Choose the backend that `--attention-backend` names; "auto" chooses the fastest one that runs on this device with
    this dtype. Raises `ConfigError` for an unknown name, and for a named backend that cannot run here."""
    if name != "auto":
        problem = attention_kind(name, given).unfit(device, dtype)
        if problem is not None:
            raise ConfigError(f"--attention-backend {name} {problem}: use auto", param="attention_backend")
        return AttentionChoice(name=name, reason="set by --attention-backend")
    problems: list[str] = []
    for each, row in ATTENTION.items():
        problem = row.make({}).unfit(device, dtype)
        if problem is None:
            return AttentionChoice(name=each, reason="; ".join(problems) or row.text)
        problems.append(f"{each} {problem}")
    raise ConfigError(f"no attention backend runs here: {'; '.join(problems)}", param="attention_backend")


def attention_kind(name: str, given: Given | None = None) -> AttentionKind:
    """Return the needs of the backend `name` (not "auto"), with its given options, and the function that makes it.
    Raises `ConfigError` for an unknown name."""
    if name not in ATTENTION:
        raise ConfigError(
            f"--attention-backend {name} is unknown; use auto, {', '.join(ATTENTION)}", param="attention_backend"
        )
    return ATTENTION[name].make(given or {})


def build_attention(name: str, device: torch.device, given: Given | None = None) -> AttentionBackend:
    """Make the backend `name` (not "auto") for tensors on `device`. Raises `ConfigError` with a remedy when the backend
    cannot run here."""
    return attention_kind(name, given).build(device)
