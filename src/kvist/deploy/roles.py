"""From a description to its roles: what each role's container runs, needs and offers, in no format yet."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from kvist.deploy.description import STOP_MARGIN_S, ContainerOptions, Deployment
from kvist.nodes.config import MASTER_HTTP_PORT, MASTER_RPC_PORT, STORE_HTTP_PORT
from kvist.nodes.config import STOP_MARGIN_S as STORE_STOP_MARGIN_S

HTTP_PORT, ENGINE_PORT = 30000, 9001
API_KEY, CLUSTER_KEY, PAGES_SECRET = "api-key", "cluster-key", "pages-secret"  # in the Secret
KEYS_FOLDER, MODELS_FOLDER = "/etc/kvist/keys", "/models"
PERSIST_FOLDER, SSD_FOLDER = "/var/cache/kvist/host-tier", "/var/cache/kvist/ssd"
OWN_ADDRESS = "$(POD_IP)"  # Kubernetes replaces it when a container starts
DRAIN_GRACE_S = 5.0  # that a load balancer needs to notice an unready server
MIN_READY_S = 5  # in which routers connect to a new worker, before another one is stopped
_FLUSH_S = 30.0  # of a store, its default
_MB_PER_GB = 1000
_TIER_MARGIN = 1.02  # of the host tier's files, beside its pages
_STORE_MEMORY_GB, _MASTER_MEMORY_GB, _ROUTER_MEMORY_GB = 1.0, 2.0, 4.0  # of the process itself


class Kind(enum.StrEnum):
    """The purpose of a role."""

    ROUTER = "router"
    WORKER = "worker"
    MASTER = "master"
    STORE = "store"


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    name: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A folder that outlives the container but not its pod, or the models.

    `megabytes` bounds it; `in_memory` folders count towards the memory of the pod."""

    name: str
    path: str
    megabytes: int | None = None
    in_memory: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSpec:
    """One role of the cluster: the same container, `replicas` times."""

    name: str
    kind: Kind
    replicas: int
    args: tuple[str, ...]  # of the `kvist` command
    ports: tuple[Port, ...]  # the first one is HTTP, with /health and /ready
    volumes: tuple[Volume, ...] = ()
    cpus: float
    memory_mb: int  # limit, with everything in memory
    gpus: int = 0
    reads_pages_secret: bool = False
    depends_on: tuple[str, ...] = ()  # roles that are started before
    drains: bool = False  # a stop is a drain of requests
    grace_s: int  # from the signal to stop to the kill
    max_replicas: int = 0  # 0: not scaled


@dataclass(frozen=True, slots=True)
class Addresses:
    """The names by which the roles reach each other; each format has its own."""

    workers: Mapping[str, tuple[str, ...]]  # by role: host names that stand for all its workers
    master: str

    def discovery(self) -> tuple[str, ...]:
        names = (name for hosts in self.workers.values() for name in hosts)
        return tuple(f"--discovery=dns:{name}:{HTTP_PORT}" for name in names)


def roles_of(deployment: Deployment, addresses: Addresses) -> list[RoleSpec]:
    """Return the roles in the order in which they start."""
    counts, container = deployment.counts, deployment.container
    roles = []
    if counts.stores:
        roles += [_master(), _store(counts.stores, container, addresses)]
    for name, replicas in worker_counts(deployment):
        roles.append(_worker(name, replicas, deployment, addresses, tuple(role.name for role in roles[:2])))
    return [*roles, _router(deployment, addresses, tuple(name for name, _ in worker_counts(deployment)))]


def worker_counts(deployment: Deployment) -> list[tuple[str, int]]:
    """Return (role, number of workers) for each role that has any."""
    counts = deployment.counts
    pairs = (("prefill", counts.prefill), ("decode", counts.decode), ("unified", counts.unified))
    return [(name, number) for name, number in pairs if number]


def _megabytes(gigabytes: float) -> int:
    return round(gigabytes * _MB_PER_GB)


def _worker(
    name: str, replicas: int, deployment: Deployment, addresses: Addresses, depends_on: tuple[str, ...]
) -> RoleSpec:
    counts, container = deployment.counts, deployment.container
    args = [
        "serve",
        f"--role={name}",
        *_model(container),
        f"--device={container.device}",
        f"--tp={container.tp}",
        *_served_at("--engine-host=0.0.0.0", f"--engine-port={ENGINE_PORT}", f"--engine-advertise-host={OWN_ADDRESS}"),
        *_stops(container),
    ]
    volumes = [
        Volume(name="shared-memory", path="/dev/shm", megabytes=_megabytes(container.worker_memory), in_memory=True),
        *_scratch(),
        *_models(container),
    ]
    if len(worker_counts(deployment)) > 1 or counts.unified > 1:
        args.append("--disaggregation-transfer-backend=mooncake")
    if container.hicache_size:
        args += [
            "--enable-hierarchical-cache",
            f"--hicache-size={container.hicache_size:g}",
            f"--hicache-persist={PERSIST_FOLDER}",
        ]
        tier_mb = _megabytes(container.hicache_size * _TIER_MARGIN)
        volumes.append(Volume(name="host-tier", path=PERSIST_FOLDER, megabytes=tier_mb, in_memory=True))
    if counts.stores:
        args += [
            "--hicache-storage-backend=mooncake",
            f"--hicache-mooncake-master-addr={addresses.master}:{MASTER_RPC_PORT}",
            f"--hicache-mooncake-replica-num={container.hicache_mooncake_replica_num}",
            f"--hicache-mooncake-master-api-key-file={KEYS_FOLDER}/{API_KEY}",  # for its figures of the pool
            f"--hicache-storage-secret-file={KEYS_FOLDER}/{PAGES_SECRET}",
        ]
    return RoleSpec(
        name=name,
        kind=Kind.WORKER,
        replicas=replicas,
        args=(*args, *container.worker_args),
        ports=(Port(name="http", number=HTTP_PORT), Port(name="engine", number=ENGINE_PORT)),
        volumes=tuple(volumes),
        cpus=container.worker_cpus,
        memory_mb=_megabytes(container.worker_memory + container.hicache_size * _TIER_MARGIN),
        gpus=container.tp if container.device == "cuda" else 0,
        reads_pages_secret=bool(counts.stores),
        depends_on=depends_on,
        drains=True,
        grace_s=deployment.grace_s,
        max_replicas=counts.max_replicas,
    )


def _router(deployment: Deployment, addresses: Addresses, depends_on: tuple[str, ...]) -> RoleSpec:
    container = deployment.container
    args = ("router", *_model(container), *_served_at(), *addresses.discovery(), *_stops(container))
    return RoleSpec(
        name="router",
        kind=Kind.ROUTER,
        replicas=1,
        args=(*args, *container.router_args),
        ports=(Port(name="http", number=HTTP_PORT),),
        volumes=(*_scratch(), *_models(container)),
        cpus=2.0,
        memory_mb=_megabytes(_ROUTER_MEMORY_GB),
        depends_on=depends_on,
        drains=True,
        grace_s=deployment.grace_s,
    )


def _master() -> RoleSpec:
    return RoleSpec(
        name="mooncake-master",
        kind=Kind.MASTER,
        replicas=1,
        args=("master", *_served_at(port=MASTER_HTTP_PORT), f"--rpc-port={MASTER_RPC_PORT}"),
        ports=(Port(name="http", number=MASTER_HTTP_PORT), Port(name="rpc", number=MASTER_RPC_PORT)),
        volumes=_scratch(),
        cpus=2.0,
        memory_mb=_megabytes(_MASTER_MEMORY_GB),
        grace_s=round(STOP_MARGIN_S),
    )


def _store(replicas: int, container: ContainerOptions, addresses: Addresses) -> RoleSpec:
    args = [
        *("store", *_served_at(f"--advertise-host={OWN_ADDRESS}", port=STORE_HTTP_PORT)),
        f"--segment-size={container.segment_size:g}",
        f"--hicache-mooncake-master-addr={addresses.master}:{MASTER_RPC_PORT}",
        f"--hicache-mooncake-master-url=http://{addresses.master}:{MASTER_HTTP_PORT}",
    ]
    volumes = list(_scratch())
    if container.ssd_size:
        args += [f"--ssd-path={SSD_FOLDER}", f"--ssd-size={container.ssd_size:g}"]
        volumes.append(Volume(name="ssd", path=SSD_FOLDER, megabytes=_megabytes(container.ssd_size * 1.1)))
    return RoleSpec(
        name="mooncake-store",
        kind=Kind.STORE,
        replicas=replicas,
        args=tuple(args),
        ports=(Port(name="http", number=STORE_HTTP_PORT),),
        volumes=tuple(volumes),
        cpus=2.0,
        memory_mb=_megabytes(container.segment_size + _STORE_MEMORY_GB + (1.0 if container.ssd_size else 0.0)),
        depends_on=("mooncake-master",),
        grace_s=round(_FLUSH_S + STORE_STOP_MARGIN_S + STOP_MARGIN_S),
    )


def _served_at(*more: str, port: int = HTTP_PORT) -> tuple[str, ...]:
    return ("--host=0.0.0.0", f"--port={port}", *more, "--log-format=json")


def _stops(container: ContainerOptions) -> tuple[str, ...]:
    return (f"--drain-timeout-s={container.drain_timeout_s:g}", f"--drain-grace-s={DRAIN_GRACE_S:g}")


def _model(container: ContainerOptions) -> tuple[str, ...]:
    return () if container.model_path is None else (f"--model-path={container.model_path}",)


def _models(container: ContainerOptions) -> tuple[Volume, ...]:
    if container.model_claim is None and container.model_folder is None:
        return ()
    return (Volume(name="models", path=MODELS_FOLDER),)


def _scratch() -> tuple[Volume, ...]:
    """The root of a container is read-only."""
    return (Volume(name="scratch", path="/tmp", megabytes=1000),)
