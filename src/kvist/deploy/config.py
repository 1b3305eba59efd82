"""The options of `kvist deploy check` and `render`, except the description of the cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvist.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedFile:
    file: Path | None = option(None, "manifest to check", unset="none: it has to be given")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    output: Path | None = option(None, "file to write", unset="standard output")
