"""Plans the processes of `kvist up`: a `kvist serve` per worker and one `kvist router`, with ports, threads and GPUs.

Plain functions from numbers to command lines; processes.py starts the processes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

from kvist.channel import host_to_name
from kvist.cluster.config import ClusterConfig
from kvist.cluster.pool_plan import PoolShape, plan_pool
from kvist.cluster.pool_plan import worker_argv as pool_argv
from kvist.cluster.ports import LOOPBACK, free_ports
from kvist.cluster.processes import STALL_RESTART_S, ChildPlan
from kvist.request import Role


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
    pool: PoolShape | None = None  # of Mooncake, started with the workers
    python: str = sys.executable

    @property
    def stop_s(self) -> float:
        """The time that an orderly stop may take: of the router, the workers, the stores and the master, in turn."""
        return 2 * self.drain_s + (0.0 if self.pool is None else 2 * self.pool.stop_s)


def worker_names(config: ClusterConfig) -> list[tuple[str, Role]]:
    """Return (name, role) of each worker, prefill first."""
    counts = ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode), (Role.UNIFIED, config.unified))
    return [(f"{role}-{index}", role) for role, count in counts for index in range(count)]


def plan_cluster(shape: ClusterShape, worker_ports: Sequence[int], pool_ports: Sequence[int] = ()) -> list[ChildPlan]:
    """Return the pool's nodes, the workers, then the router. `worker_ports` has one free port per worker, `pool_ports`
    as many as the pool needs."""
    assert len(worker_ports) == shape.config.num_workers
    kvist = (shape.python, "-m", "kvist")
    nodes = [] if shape.pool is None else plan_pool(shape.pool, kvist, pool_ports)
    node_names = tuple(node.name for node in nodes)
    pool = pool_argv(pool_ports) if nodes else ()
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
                    *pool,
                    *own,
                ),
                url=url,
                starts_after=node_names,
                stops_before=node_names,
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
        stops_before=tuple(plan.name for plan in plans),
    )
    return [*nodes, *plans, router]


def _persist(shape: ClusterShape, name: str) -> tuple[str, ...]:
    """Return the option with the worker's own folder; the worker has the same name at the next start."""
    if shape.persist_folder is None:
        return ()
    folder = Path(shape.persist_folder, *([name] if shape.config.num_workers > 1 else []))
    return (f"--hicache-persist={folder}",)


def plan_on_free_ports(shape: ClusterShape) -> list[ChildPlan]:
    """Call `plan_cluster` with free ports; the router uses its own port unless that is 0."""
    num_workers, num_pool = shape.config.num_workers, 0 if shape.pool is None else shape.pool.num_ports
    spare, *ports = free_ports(1 + num_workers + num_pool)
    shape = replace(shape, router_port=shape.router_port or spare)
    return plan_cluster(shape, ports[:num_workers], ports[num_workers:])


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
