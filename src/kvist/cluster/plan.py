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
from kvist.cluster.processes import STALL_RESTART_S
from kvist.request import Role
from kvist.supervisor.child import ChildPlan

ROUTER = "router"


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
    front_fd: int | None = None  # a socket bound to this address, which the router inherits; None: it binds its own
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

    @property
    def worker_names(self) -> tuple[str, ...]:
        return tuple(name for name, _role in worker_names(self.config))

    def folder_of(self, worker: str) -> Path | None:
        """Return the folder of the worker's host tier, if it has one; it has the same one at the next start."""
        if self.persist_folder is None:
            return None
        return Path(self.persist_folder, *([worker] if self.config.num_workers > 1 else []))

    @property
    def url(self) -> str:
        """The router's address for clients."""
        return f"http://{host_to_name(self.router_host, LOOPBACK)}:{self.router_port}"


def worker_names(config: ClusterConfig) -> list[tuple[str, Role]]:
    """Return (name, role) of each worker, prefill first."""
    counts = ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode), (Role.UNIFIED, config.unified))
    return [(f"{role}-{index}", role) for role, count in counts for index in range(count)]


def plan_cluster(
    shape: ClusterShape,
    worker_ports: Sequence[int],
    pool_ports: Sequence[int] = (),
    router_port: int | None = None,
) -> list[ChildPlan]:
    """Return the pool's nodes, the workers, then the router. `worker_ports` has one free port per worker, `pool_ports`
    as many as the pool needs; `router_port` is only for a router behind the socket of `kvist up`."""
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
    return [*nodes, *plans, plan_router(shape, urls, router_port, tuple(plan.name for plan in plans))]


def plan_router(
    shape: ClusterShape, urls: Mapping[Role, Sequence[str]], own_port: int | None, workers: tuple[str, ...]
) -> ChildPlan:
    """Return the router of the workers at `urls`, named `workers`. Behind the socket of `kvist up` (`front_fd`) it is
    asked whether it is ready at `own_port` of loopback; else it has the address of `shape`."""
    remote = []
    for flag, role in (("--prefill", Role.PREFILL), ("--decode", Role.DECODE), ("--worker-urls", Role.UNIFIED)):
        remote += [flag, *urls[role]] if urls.get(role) else []
    host, port = shape.router_host, shape.router_port
    front: tuple[str, ...] = ()
    if shape.front_fd is not None:
        assert own_port is not None
        host, port, front = LOOPBACK, own_port, (f"--listen-fd={shape.front_fd}",)
    return ChildPlan(
        name=ROUTER,
        argv=(
            *(shape.python, "-m", "kvist", "router", *shape.router_argv, *remote),
            *(f"--host={host}", f"--port={port}", *front, "--stop-with-stdin"),
        ),
        url=f"http://{host_to_name(host, LOOPBACK)}:{port}",
        environ=shape.router_environ,
        stops_before=workers,
        listen_fd=shape.front_fd,
    )


def _persist(shape: ClusterShape, name: str) -> tuple[str, ...]:
    folder = shape.folder_of(name)
    return () if folder is None else (f"--hicache-persist={folder}",)


def plan_on_free_ports(shape: ClusterShape) -> list[ChildPlan]:
    """Call `plan_cluster` with free ports; the router uses its own port unless that is 0."""
    num_workers, num_pool = shape.config.num_workers, 0 if shape.pool is None else shape.pool.num_ports
    spare, *ports = free_ports(1 + num_workers + num_pool)
    shape = replace(shape, router_port=shape.router_port or spare)
    return plan_cluster(shape, ports[:num_workers], ports[num_workers:], spare)


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
