"""`kvist upgrade`, and what `kvist up` needs for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from kvist.cluster.plan import ROUTER, ClusterShape
from kvist.cluster.pool_plan import MASTER
from kvist.cluster.processes import Processes
from kvist.memory.runtime_dir import runtime_dir
from kvist.upgrade.config import UpgradeOptions
from kvist.upgrade.control import Request, ask_for_upgrade, find_cluster, serving_control
from kvist.upgrade.order import Kind, Order, Part, plan_upgrade
from kvist.upgrade.replacing import Outcome, Replacing, Show, Successor
from kvist.upgrade.view import HttpClusterView


def run_upgrade(options: UpgradeOptions, named_runtime_dir: str | None) -> int:
    """Upgrade the running cluster; return 0 if every process was replaced, else 1. Raises `KvistError`."""
    path = find_cluster(runtime_dir(named_runtime_dir), options.port)
    request = Request(python=options.new_python, order=options.order, start_timeout_s=options.start_timeout_s)
    return ask_for_upgrade(path, request, lambda text: print(text, flush=True))


@contextlib.contextmanager
def upgradable(shape: ClusterShape, processes: Processes, show: Show) -> Iterator[None]:
    """Let `kvist upgrade` replace the processes while the body runs. `show` prints lines of `kvist up`."""
    view = HttpClusterView(shape.api_keys[0] if shape.api_keys else None)

    def upgrade(successor: Successor, order: Order, tell: Show) -> Outcome:
        def show_both(text: str) -> None:
            show(f"upgrade: {text}")
            tell(text)

        steps = plan_upgrade(parts_of(shape), order)
        return Replacing(processes, view, shape, successor, show_both).run(steps)

    with serving_control(runtime_dir(shape.runtime_dir), shape.router_port, upgrade):
        yield


def parts_of(shape: ClusterShape) -> list[Part]:
    """Return the processes of a cluster, as the plan of an upgrade sees them."""
    parts = []
    if shape.pool is not None:
        for name in shape.pool.names:
            kind = Kind.MASTER if name == MASTER else Kind.STORE
            ssd_path = shape.pool.ssd_path if kind is Kind.STORE else None
            parts.append(Part(name=name, kind=kind, folder=None if ssd_path is None else Path(ssd_path, name)))
    for name in shape.worker_names:
        parts.append(Part(name=name, kind=Kind.WORKER, has_gpu=shape.num_gpus > 0, folder=shape.folder_of(name)))
    return [*parts, Part(name=ROUTER, kind=Kind.ROUTER)]
