"""Plan to tensors to tokens. `build_runner` makes the runner of a checkpoint for its device."""

from __future__ import annotations

from kvist.runner.build import RunnerConfig, build_runner
from kvist.runner.runner import AnyRunner, InFlight, Runner

__all__ = ["AnyRunner", "InFlight", "Runner", "RunnerConfig", "build_runner"]
