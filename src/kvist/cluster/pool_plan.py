"""Plans the page pool of `kvist up --storage mooncake`: one `kvist master`, several `kvist store`s, on loopback.

The stores start when the master is ready, the workers when the stores are; a stop goes the other way. A store has the
same name at the next start only if its port is the same, but its pages are found by its folder, `SSD_PATH/store-0`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvist.cluster.ports import LOOPBACK
from kvist.errors import ConfigError
from kvist.supervisor.child import ChildPlan

MASTER = "master"
NUM_MASTER_PORTS = 2  # HTTP and RPC


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolShape:
    """The pool to start. `*_argv` are the options given by the user that this verb knows."""

    num_stores: int
    master_argv: tuple[str, ...] = ()
    store_argv: tuple[str, ...] = ()
    ssd_path: str | None = None
    ssd_size: float | None = None  # GB, of each store
    stop_s: float = 0.0  # time that a store may take to leave the pool

    @property
    def num_ports(self) -> int:
        return NUM_MASTER_PORTS + self.num_stores

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all nodes."""
        return (MASTER, *(f"store-{index}" for index in range(self.num_stores)))

    def make_folders(self) -> None:
        """Create the folder of each store in the folder given by the user. Raises `ConfigError`."""
        if self.ssd_path is None:
            return
        for name in self.names[1:]:
            try:
                Path(self.ssd_path, name).mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"--ssd-path {self.ssd_path}: the folder {name} cannot be created there ({error.strerror}); create "
                    f"the path first: mkdir -p {self.ssd_path}",
                    param="ssd_path",
                ) from error


def plan_pool(pool: PoolShape, kvist: Sequence[str], ports: Sequence[int]) -> list[ChildPlan]:
    """Return the master and the stores. `kvist` is the command, `ports` has `num_ports` free ports."""
    http_port, rpc_port, *store_ports = ports
    master_url = f"http://{LOOPBACK}:{http_port}"
    own = (f"--host={LOOPBACK}", f"--port={http_port}", f"--rpc-port={rpc_port}", "--stop-with-stdin")
    plans = [ChildPlan(name=MASTER, argv=(*kvist, "master", *pool.master_argv, *own), url=master_url)]
    for name, port in zip(pool.names[1:], store_ports, strict=True):
        its_own = (
            *(f"--host={LOOPBACK}", f"--port={port}", "--stop-with-stdin"),
            *(f"--hicache-mooncake-master-addr={LOOPBACK}:{rpc_port}", f"--hicache-mooncake-master-url={master_url}"),
        )
        plans.append(
            ChildPlan(
                name=name,
                argv=(*kvist, "store", *pool.store_argv, *_ssd(pool, name), *its_own),
                url=f"http://{LOOPBACK}:{port}",
                starts_after=(MASTER,),
                stops_before=(MASTER,),
                stop_s=pool.stop_s,
            )
        )
    return plans


def _ssd(pool: PoolShape, name: str) -> tuple[str, ...]:
    if pool.ssd_path is None:
        return ()
    size = () if pool.ssd_size is None else (f"--ssd-size={pool.ssd_size}",)
    return (f"--ssd-path={Path(pool.ssd_path, name)}", *size)


def worker_argv(ports: Sequence[int]) -> tuple[str, ...]:
    """Return the options by which a worker uses the pool at these ports."""
    http_port, rpc_port = ports[:NUM_MASTER_PORTS]
    return (
        f"--hicache-mooncake-master-addr={LOOPBACK}:{rpc_port}",
        f"--hicache-mooncake-master-url=http://{LOOPBACK}:{http_port}",
    )
