"""What `kvist up` runs: a `kvist serve` for each worker and one `kvist router`, with ports, threads and GPUs dealt out.

A plain function from numbers to command lines; processes.py starts them.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

from kvist.channel import host_to_name
from kvist.cluster.config import ClusterConfig
from kvist.cluster.processes import STALL_RESTART_S, ChildPlan

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
    shows_all_lines: bool = False  # also those of a start that goes well
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # for the example of a request only
    threads_per_worker: int = 1
    num_gpus: int = 0  # to be dealt out, from `base_gpu_id` on
    base_gpu_id: int = 0
    gpus_per_worker: int = 1
    persist_folder: str | None = None  # of the host tiers
    drain_s: float = 10.0  # what each process gives its open requests when it stops
    stall_restart_s: float = STALL_RESTART_S
    runtime_dir: str | None = None  # of the engines; None: the user's own
    memory_share: float | None = None  # of one GPU, for the workers on it together; None: each has been told its own
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
    gpus = assign_gpus(shape)
    for index, ((name, role), port) in enumerate(zip(worker_names(shape.config), worker_ports, strict=True)):
        url = f"http://{LOOPBACK}:{port}"
        urls[role].append(url)
        own = (f"--role={role}", f"--host={LOOPBACK}", f"--port={port}", "--stop-with-stdin")
        threads = (f"--num-threads={shape.threads_per_worker}",)
        plans.append(
            ChildPlan(
                name=name,
                argv=(
                    *kvist,
                    "serve",
                    *shape.worker_argv,
                    *threads,
                    *(gpus[index] if gpus else ()),
                    *_persist(shape, name),
                    *own,
                ),
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
        url=f"http://{host_to_name(shape.router_host, LOOPBACK)}:{shape.router_port}",
        environ=shape.router_environ,
    )
    return [*plans, router]


def _persist(shape: ClusterShape, name: str) -> tuple[str, ...]:
    """One worker, one folder; the worker's name is the same at the next start."""
    if shape.persist_folder is None:
        return ()
    folder = Path(shape.persist_folder, *([name] if shape.config.num_workers > 1 else []))
    return (f"--hicache-persist={folder}",)


def plan_on_free_ports(shape: ClusterShape) -> list[ChildPlan]:
    """`plan_cluster` with ports found now; the router keeps its own unless it is 0."""
    *worker_ports, spare = free_ports(shape.config.num_workers + 1)
    return plan_cluster(replace(shape, router_port=shape.router_port or spare), worker_ports)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody held a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [int(one.getsockname()[1]) for one in sockets]


def assign_gpus(shape: ClusterShape) -> list[tuple[str, ...]]:
    """Options for each worker: its GPU, round-robin, and its share of the memory where several have the same one.

    Nothing is dealt out where there are no GPUs. Where there are fewer than one worker asks for, all are told the first
    place that was asked for: they refuse it, and say why."""
    if not shape.num_gpus:
        return []
    num_places = max(1, (shape.num_gpus - shape.base_gpu_id) // shape.gpus_per_worker)
    places = [index % num_places for index in range(shape.config.num_workers)]
    assigned = []
    for place in places:
        options = [f"--base-gpu-id={shape.base_gpu_id + place * shape.gpus_per_worker}"]
        if shape.memory_share is not None and places.count(place) > 1:
            options.append(f"--mem-fraction-static={shape.memory_share / places.count(place):.4f}")
        assigned.append(tuple(options))
    return assigned


def visible_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that a worker started from here would see, without asking the driver."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return sum(path.name.removeprefix("nvidia").isdecimal() for path in devices.glob("nvidia*"))
    names = [name.strip() for name in chosen.split(",")]
    return len(list(takewhile(lambda name: name not in ("", "-1"), names)))  # CUDA stops at the first that is no GPU


def threads_for_each(num_workers: int, num_cores: int) -> int:
    """Compute threads for each worker: the cores dealt out evenly, at least one."""
    return max(1, num_cores // num_workers)
