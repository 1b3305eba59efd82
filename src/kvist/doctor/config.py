"""The options of `kvist doctor` that no other verb has."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    json: bool = option(False, "print one JSON object instead of lines")
    torch: bool = option(
        True, "import torch in a process of its own, to learn which GPUs it can use: takes a few seconds"
    )
