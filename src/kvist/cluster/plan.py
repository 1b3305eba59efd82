"""What `kvist up` runs: one `kvist serve` for each worker and one `kvist router`, with ports and threads dealt out.

A plain function from numbers to command lines; processes.py starts them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvist.channel import WILDCARD_HOSTS, bracketed
from kvist.cluster.config import ClusterConfig
from kvist.cluster.processes import ChildPlan

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterShape:
    """Everything that decides the command lines. `*_argv` are the options the user gave that reach that verb."""

    config: ClusterConfig
    worker_argv: tuple[str, ...] = ()
    worker_environ: dict[str, str] = field(default_factory=dict)
    router_argv: tuple[str, ...] = ()
    router_environ: dict[str, str] = field(default_factory=dict)
    router_host: str = LOOPBACK
    router_port: int = 30000
    threads_per_worker: int = 1
    python: str = sys.executable


def worker_names(config: ClusterConfig) -> list[tuple[str, str]]:
    """(name, role) of each worker, prefill first."""
    counts = (("prefill", config.prefill), ("decode", config.decode), ("unified", config.unified))
    return [(f"{role}-{index}", role) for role, count in counts for index in range(count)]


def plan_cluster(shape: ClusterShape, worker_ports: Sequence[int]) -> list[ChildPlan]:
    """Workers first, the router last. `worker_ports` has one free port a worker."""
    assert len(worker_ports) == shape.config.num_workers
    kvist = (shape.python, "-m", "kvist")
    plans = []
    urls: dict[str, list[str]] = {"prefill": [], "decode": [], "unified": []}
    for (name, role), port in zip(worker_names(shape.config), worker_ports, strict=True):
        url = f"http://{LOOPBACK}:{port}"
        urls[role].append(url)
        own = (f"--role={role}", f"--host={LOOPBACK}", f"--port={port}", "--stop-with-stdin")
        threads = (f"--num-threads={shape.threads_per_worker}",)
        plans.append(
            ChildPlan(
                name=name,
                argv=(*kvist, "serve", *shape.worker_argv, *threads, *own),
                url=url,
                environ=shape.worker_environ,
            )
        )
    remote = []
    for flag, role in (("--prefill", "prefill"), ("--decode", "decode"), ("--worker-urls", "unified")):
        remote += [flag, *urls[role]] if urls[role] else []
    router = ChildPlan(
        name="router",
        argv=(
            *(*kvist, "router", *shape.router_argv, *remote),
            *(f"--host={shape.router_host}", f"--port={shape.router_port}", "--stop-with-stdin"),
        ),
        url=f"http://{_reachable(shape.router_host)}:{shape.router_port}",
        environ=shape.router_environ,
    )
    return [*plans, router]


def plan_on_free_ports(shape: ClusterShape) -> list[ChildPlan]:
    """`plan_cluster` with ports found now; the router keeps its own unless it is 0."""
    *worker_ports, spare = free_ports(shape.config.num_workers + 1)
    return plan_cluster(replace(shape, router_port=shape.router_port or spare), worker_ports)


def _reachable(host: str) -> str:
    """The address by which we ourselves reach a server bound to `host`."""
    if not host or host in WILDCARD_HOSTS:
        return LOOPBACK
    return bracketed(host)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody held a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [int(one.getsockname()[1]) for one in sockets]


def share_threads(num_workers: int, num_cores: int | None = None) -> int:
    """Compute threads for each worker: the cores dealt out evenly, at least one."""
    cores = num_cores if num_cores is not None else available_cores()
    return max(1, cores // num_workers)


def available_cores() -> int:
    """Cores this process may use; fewer than the machine has, in a container with a CPU set."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
