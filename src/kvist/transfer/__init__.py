"""The transports, which copy pages between engines. transport.py has the interface; each transport has its own file and
one row here."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvist.door import Backend, Door, Given, backend, backend_with, names_of
from kvist.errors import ConfigError
from kvist.plan.transfers import TransferReport
from kvist.transfer.epoch import EpochWatch
from kvist.transfer.mooncake_options import MooncakeOptions
from kvist.transfer.transport import OfferedTransport, Transport, TransportContext, TransportKind
from kvist.transfer.transports import Transports

if TYPE_CHECKING:
    from kvist.memory.device_pool import DevicePool

__all__ = [
    "TRANSPORTS",
    "OfferedTransport",
    "TransferReport",
    "Transport",
    "TransportContext",
    "TransportKind",
    "Transports",
    "make_transports",
]

logger = logging.getLogger(__name__)


def _shm() -> TransportKind:
    from kvist.transfer.shm import SHM

    return SHM


def _cuda_ipc() -> TransportKind:
    from kvist.transfer.cuda_ipc import CUDA_IPC

    return CUDA_IPC


def _host_staged() -> TransportKind:
    from kvist.transfer.host_staged import HOST_STAGED

    return HOST_STAGED


def _mooncake(options: MooncakeOptions) -> TransportKind:
    from kvist.transfer.mooncake import mooncake_kind

    return mooncake_kind(options)


TRANSPORTS: Door[[], TransportKind] = {  # by `PoolAddress.transport`; a pair of engines prefers the first it has
    "shm": backend(_shm, text="between pools in the memory of one host, by mapping the peer's file"),
    "cuda-ipc": backend(_cuda_ipc, text="between pools on the GPUs of one host, by opening the peer's memory"),
    "host-staged": backend(
        _host_staged, text="between pools in any memory of one host, GPUs and CPUs, through a file in host memory"
    ),
    "mooncake": backend_with(
        MooncakeOptions,
        _mooncake,
        text="between pools in the memory of any two hosts, over TCP or RDMA; part of auto only if one of its "
        "options is set",
    ),
}


def make_transports(
    pool: DevicePool,
    *,
    runtime_dir: Path,
    wakeup: Callable[[], None],
    names: str = "auto",
    given: Given | None = None,
    advertised_host: str = "127.0.0.1",
) -> Transports:
    """Make the transports that `--disaggregation-transfer-backend` names, with their given options: for "auto" all
    that work with this pool. Raises `ConfigError` for a named one that does not."""
    watch = EpochWatch(runtime_dir)
    offered: dict[str, OfferedTransport] = {}
    settle_s = 0.0
    with contextlib.ExitStack() as closing:  # after an error
        closing.callback(watch.close)
        for name in names_of(TRANSPORTS, names):
            row = TRANSPORTS[name]
            options = {key: value for key, value in (given or {}).items() if key in _fields(row)}
            kind = row.make(options)
            if names == "auto" and kind.only_by_name and not options:
                continue
            obstacle = kind.obstacle_for(pool)
            if obstacle and (names != "auto" or options):
                remedy = "" if names == "auto" else ". Use auto, which offers all that work here"
                raise ConfigError(
                    f"--disaggregation-transfer-backend {name}: {obstacle}{remedy}",
                    param="disaggregation_transfer_backend",
                )
            if obstacle:
                logger.debug("the transport %s is not offered: %s", name, obstacle)
                continue
            context = TransportContext(
                pool=pool,
                address=kind.address(name, pool),
                runtime_dir=runtime_dir,
                watch=watch,
                wakeup=wakeup,
                advertised_host=advertised_host,
            )
            offered[name] = kind.build(context)
            closing.callback(offered[name].close)
            settle_s = max(settle_s, kind.settle_s)
        closing.pop_all()
    return Transports(offered, watch=watch, wakeup=wakeup, settle_s=settle_s)


def _fields(row: Backend[[], TransportKind]) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(row.options))
