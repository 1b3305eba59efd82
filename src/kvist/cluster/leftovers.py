"""What killed workers leave in the runtime directory, removed by the process that started them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable

from kvist.clock import MonotonicClock
from kvist.cluster.processes import Processes
from kvist.errors import ConfigError
from kvist.kv.runtime_dir import remove_leftovers, runtime_dir

_WAIT_S, _PAUSE_S = 3.0, 0.02  # for the kernel to take the memory of a process that was killed


def stop_and_clear(processes: Processes, named: str | None) -> None:
    """`named` is their --runtime-dir."""
    group_ids = [child.pid for child in processes.children.values()]
    processes.stop()
    clear_runtime_dir(named, group_ids)


def clear_runtime_dir(named: str | None, group_ids: Iterable[int | None]) -> None:
    """When these process groups were stopped or killed: their files are nobody's once they are gone."""
    clock = MonotonicClock()
    deadline_s = clock.now_s() + _WAIT_S
    for group_id in group_ids:
        while group_id is not None and _group_exists(group_id) and clock.now_s() < deadline_s:
            time.sleep(_PAUSE_S)
    with contextlib.suppress(ConfigError, OSError):  # the workers have said what is wrong with it
        remove_leftovers(runtime_dir(named))


def _group_exists(group_id: int) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group_id, 0)
        return True
    return False
