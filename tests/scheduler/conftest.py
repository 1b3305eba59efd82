"""Makes the simulator and its parts in this folder importable by name from the tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

for name in ("fake_device", "fake_store", "slot_check", "scheduler_sim", "handoff_bench"):  # in order of their imports
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
