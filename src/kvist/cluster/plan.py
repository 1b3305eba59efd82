"""Plans the processes of `kvist up`: a `kvist serve` per worker and one `kvist router`, with ports, threads and GPUs.

Plain functions from numbers to command lines; processes.py starts the processes.
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
from kvist.request import Role

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterShape:
    """The input of the plan. `*_argv` are the options given by the user that this verb knows."""

    config: ClusterConfig
    worker_argv: tuple[str, ...] = ()
    worker_environ: dict[str, str] = field(default_factory=dict)
    router_argv: tuple[str, ...] = ()
    router_environ: dict[str, str] = field(default_factory=dict)
    router_host: str = LOOPBACK
    router_port: int = 30000
    shows_all_lines: bool = False  # also INFO and DEBUG lines during the start
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # only for the example request
    threads_per_worker: int = 1
    num_gpus: int = 0  # GPUs to assign, starting at `base_gpu_id`
    base_gpu_id: int = 0
    gpus_per_worker: int = 1
    persist_folder: str | None = None  # of the host tiers
    drain_s: float = 10.0  # time for the open requests of each process at a stop
    stall_restart_s: float = STALL_RESTART_S
    runtime_dir: str | None = None  # of the engines; None: the user's own
    memory_share: float | None = None  # of one GPU, shared by its workers; None: set by the user, for each worker
    python: str = sys.executable


def worker_names(config: ClusterConfig) -> list[tuple[str, Role]]:
    """Return (name, role) of each worker, prefill first."""
    counts = ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode), (Role.UNIFIED, config.unified))
    return [(f"{role}-{index}", role) for role, count in counts for index in range(count)]


def plan_cluster(shape: ClusterShape, worker_ports: Sequence[int]) -> list[ChildPlan]:
    """Return the workers, then the router. `worker_ports` has one free port per worker."""
    assert len(worker_ports) == shape.config.num_workers
    kvist = (shape.python, "-m", "kvist")
    plans = []
    urls: dict[Role, list[str]] = {role: [] for role in Role}
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
    for flag, role in (("--prefill", Role.PREFILL), ("--decode", Role.DECODE), ("--worker-urls", Role.UNIFIED)):
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
    """Return the option with the worker's own folder; the worker has the same name at the next start."""
    if shape.persist_folder is None:
        return ()
    folder = Path(shape.persist_folder, *([name] if shape.config.num_workers > 1 else []))
    return (f"--hicache-persist={folder}",)


def plan_on_free_ports(shape: ClusterShape) -> list[ChildPlan]:
    """Call `plan_cluster` with free ports; the router uses its own port unless that is 0."""
    *worker_ports, spare = free_ports(shape.config.num_workers + 1)
    return plan_cluster(replace(shape, router_port=shape.router_port or spare), worker_ports)


def free_ports(count: int) -> list[int]:
    """Return different ports of the loopback interface that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [int(one.getsockname()[1]) for one in sockets]


def assign_gpus(shape: ClusterShape) -> list[tuple[str, ...]]:
    """Return options for each worker: its GPU, round-robin, and a share of the memory if workers share a GPU.

    Without GPUs, return no options. If there are fewer GPUs than one worker needs, every worker gets the first GPU ids
    requested: the workers refuse them with an error that gives the reason."""
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
    """Return the number of NVIDIA GPUs visible to a worker started by this process, without calling the driver."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return sum(path.name.removeprefix("nvidia").isdecimal() for path in devices.glob("nvidia*"))
    names = [name.strip() for name in chosen.split(",")]
    return len(list(takewhile(lambda name: name not in ("", "-1"), names)))  # CUDA stops at the first invalid id


def threads_for_each(num_workers: int, num_cores: int) -> int:
    """Return the compute threads of each worker: an equal share of the cores, at least one."""
    return max(1, num_cores // num_workers)
