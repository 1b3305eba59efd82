"""The options of the transport `mooncake`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvist.config import option
from kvist.errors import ConfigError
from kvist.mooncake.requirements import PROTOCOLS, Network, User

_DEVICE_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,63}")

HANDOFFS = User(
    title="handoffs",
    protocol_flag="--transfer-protocol",
    devices_flag="--transfer-device",
    host_flag="--transfer-host",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakeOptions:
    protocol: str = option("tcp", "network of the copies between hosts", choices=PROTOCOLS)
    device: str | None = option(None, "RDMA devices, such as mlx5_0, with commas", unset="all of this host")
    host: str | None = option(None, "address of this host for the copies of peers", unset="that of the engine's socket")

    def __post_init__(self) -> None:
        if self.device is not None and self.protocol != "rdma":
            raise ConfigError(
                f"--transfer-device {self.device} needs RDMA: add --transfer-protocol rdma", param="transfer_device"
            )

        if self.device is not None and not all(_DEVICE_NAME.fullmatch(name) for name in self.device.split(",")):
            raise ConfigError(
                f"--transfer-device {self.device!r} is not a list of device names with commas and no spaces, such as "
                "mlx5_0,mlx5_1",
                param="transfer_device",
            )

    def network(self, advertised_host: str) -> Network:
        devices = () if self.device is None else tuple(self.device.split(","))
        return Network(host=self.host or advertised_host, protocol=self.protocol, devices=devices)
