"""The transports, which copy pages between engines. transport.py has the interface; each transport has its own file and
one row here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvist.door import Door, Given, backend
from kvist.errors import ConfigError
from kvist.plan.transfers import TransferReport
from kvist.transfer.transport import Transport, TransportContext, TransportKind

if TYPE_CHECKING:
    from kvist.memory.device_pool import DevicePool

__all__ = ["TRANSPORTS", "TransferReport", "Transport", "TransportContext", "TransportKind", "make_transport"]


def _shm() -> TransportKind:
    from kvist.transfer.shm import SHM

    return SHM


def _cuda_ipc() -> TransportKind:
    from kvist.transfer.cuda_ipc import CUDA_IPC

    return CUDA_IPC


TRANSPORTS: Door[[], TransportKind] = {  # by `PoolAddress.transport`; "auto" takes the first for pools on the device
    "shm": backend(_shm, text="between pools in the memory of one host, by mapping the peer's file"),
    "cuda-ipc": backend(_cuda_ipc, text="between pools on the GPUs of one host, by opening the peer's memory"),
}


def make_transport(
    pool: DevicePool, *, runtime_dir: Path, wakeup: Callable[[], None], name: str = "auto", given: Given | None = None
) -> Transport:
    """Make the transport named by `--disaggregation-transfer-backend`, with the `given` options. Raises `ConfigError`
    if it does not copy between pools on this device."""
    device_type = pool.tensor.device.type
    if name == "auto":
        name = next(each for each, row in TRANSPORTS.items() if row.make({}).device_type == device_type)
    kind = TRANSPORTS[name].make(given or {})
    if kind.device_type != device_type:
        raise ConfigError(
            f"--disaggregation-transfer-backend {name} copies between pools on {kind.device_type}, and this pool is on "
            f"{device_type}: use auto",
            param="disaggregation_transfer_backend",
        )
    address = msgspec.structs.replace(pool.address, transport=name)
    return kind.build(TransportContext(pool=pool, address=address, runtime_dir=runtime_dir, wakeup=wakeup))
