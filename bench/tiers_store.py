"""The store of a benchmark, a folder or a Mooncake pool on loopback: empty at first, removed afterwards."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvist.checkpoint import find_checkpoint
from kvist.cluster.ports import free_ports
from kvist.kv.layout import PageLayout
from kvist.models import load_model_config
from served import BenchServer

PAGE_SIZE = 16
STORAGES = ("file", "mooncake")
_POOL_ROOM = 1.25  # a pool evicts before it is full
_LEAST_SEGMENT_GB = 0.064


def kv_token_bytes(model_path: str | None, dtype: str) -> int:
    """Return the number of bytes of K/V that one token of the model has."""
    config = load_model_config(find_checkpoint(model_path))
    layout = PageLayout(
        num_kv_heads=config.num_kv_heads,
        num_layers=config.num_layers,
        page_size=PAGE_SIZE,
        head_dim=config.head_dim,
        dtype=dtype,
    )
    return layout.page_bytes // PAGE_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlan:
    storage: str  # one of STORAGES
    num_bytes: int
    parent: Path  # of the folder
    logs: Path  # of the nodes of a pool
    num_stores: int = 3  # of a pool
    start_timeout_s: float = 60.0  # of each node


@contextlib.contextmanager
def opened_store(plan: StorePlan) -> Iterator[list[str]]:
    """Yield the flags of workers that use the store. Raises `BenchFailure` if a node of the pool does not start."""
    with _folder(plan) if plan.storage == "file" else _pool(plan) as flags:
        yield flags


@contextlib.contextmanager
def _folder(plan: StorePlan) -> Iterator[list[str]]:
    folder = tempfile.mkdtemp(prefix="store-", dir=plan.parent)
    try:
        yield [
            "--hicache-storage-backend=file",
            f"--hicache-storage-path={folder}",
            f"--hicache-storage-size={plan.num_bytes / 1e9:.6f}",
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _pool(plan: StorePlan) -> Iterator[list[str]]:
    """A `kvist master` and `num_stores` of `kvist store`, in memory."""
    (rpc_port,) = free_ports(1)
    address = f"127.0.0.1:{rpc_port}"
    segment_gb = max(_LEAST_SEGMENT_GB, _POOL_ROOM * plan.num_bytes / 1e9 / plan.num_stores)
    with contextlib.ExitStack() as nodes:
        master = nodes.enter_context(
            BenchServer("master", [f"--rpc-port={rpc_port}", "--no-access-log"], plan.logs, verb="master")
        )
        master.start(plan.start_timeout_s)
        joining = [f"--segment-size={segment_gb:.6f}", "--no-access-log", f"--hicache-mooncake-master-addr={address}"]
        joining.append(f"--hicache-mooncake-master-url={master.url}")
        for number in range(plan.num_stores):
            store = nodes.enter_context(BenchServer(f"store-{number}", joining, plan.logs, verb="store"))
            store.start(plan.start_timeout_s)
        yield ["--hicache-storage-backend=mooncake", f"--hicache-mooncake-master-addr={address}"]
