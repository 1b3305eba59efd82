"""Removes the files that killed workers leave in the runtime directory, in the process that started the workers."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable

from kvist.clock import MonotonicClock
from kvist.cluster.processes import Processes
from kvist.errors import ConfigError
from kvist.memory.runtime_dir import remove_leftovers, runtime_dir

_WAIT_S, _PAUSE_S = 3.0, 0.02  # for the kernel to free the memory of a killed process


def stop_and_clear(processes: Processes, named: str | None) -> None:
    """Stop the processes, then remove their leftovers. `named` is their --runtime-dir."""
    group_ids = [child.pid for child in processes.children.values()]
    processes.stop()
    clear_runtime_dir(named, group_ids)


def clear_runtime_dir(named: str | None, group_ids: Iterable[int | None]) -> None:
    """Remove the files of dead engines, after waiting until these stopped or killed process groups are gone."""
    clock = MonotonicClock()
    deadline_s = clock.now_s() + _WAIT_S
    for group_id in group_ids:
        while group_id is not None and _group_exists(group_id) and clock.now_s() < deadline_s:
            time.sleep(_PAUSE_S)
    with contextlib.suppress(ConfigError, OSError):  # the workers have logged the problem
        remove_leftovers(runtime_dir(named))


def _group_exists(group_id: int) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group_id, 0)
        return True
    return False
