"""Lends the rooms' fakes to the tests of this folder: the application over a scripted dispatcher (tests/server)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_NAME = "server_fixtures"
if _NAME not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).parents[1] / "server" / "conftest.py")
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[_NAME] = _module
    _spec.loader.exec_module(_module)

from server_fixtures import bench, busy, letters, make_bench, read_events  # noqa: E402

__all__ = ["bench", "busy", "letters", "make_bench", "read_events"]
