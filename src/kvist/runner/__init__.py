"""Plan to tensors to tokens. `build_runner` makes a `Runner` of a checkpoint."""

from __future__ import annotations

from kvist.runner.build import RunnerConfig, build_runner
from kvist.runner.runner import Runner

__all__ = ["Runner", "RunnerConfig", "build_runner"]
