"""The names of models: a path of this machine, or ORG/NAME of the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_WORD = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_NAME = re.compile(rf"({_WORD}/{_WORD})(?:/((?:{_WORD}/)*{_WORD}\.gguf))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    repo: str  # ORG/NAME
    file: str | None = None  # a GGUF file of the repository

    def __str__(self) -> str:
        return self.repo if self.file is None else f"{self.repo}/{self.file}"


def is_local(model_path: str) -> bool:
    """Return whether the path exists here. A local path has precedence over a model of the Hub."""
    return Path(model_path).expanduser().exists()


def hub_name(model_path: str) -> HubName | None:
    """Return the model of the Hub that ORG/NAME or ORG/NAME/FILE.gguf names; None for any other text."""
    found = _NAME.fullmatch(model_path)
    return None if found is None else HubName(repo=found[1], file=found[2])
