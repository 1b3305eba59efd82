"""Writes the file of a benchmark's `--json FILE`: where and how it was measured, and every row."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path


def write_report(path: Path, args: argparse.Namespace, **results: object) -> None:
    """Write {commit, hardware, settings, **results}; `results` are `rows`, and figures derived from them."""
    settings = {name: value for name, value in vars(args).items() if name != "json" and value is not None}
    about = {"commit": _commit(), "hardware": _hardware(), "settings": settings}
    path.write_text(json.dumps({**about, **results}, indent=1, default=os.fspath), encoding="utf-8")


def _commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _hardware() -> dict[str, object]:
    hardware: dict[str, object] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    if torch := sys.modules.get("torch"):  # only if the benchmark uses torch
        hardware["torch"] = torch.__version__
        if torch.cuda.is_available():
            hardware["gpu"] = torch.cuda.get_device_name()
    return hardware
