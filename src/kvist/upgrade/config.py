"""The options of `kvist upgrade`."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from kvist.config import option
from kvist.upgrade.order import Order


@dataclass(frozen=True, slots=True, kw_only=True)
class UpgradeOptions:
    port: int | None = option(
        None, "port of the cluster's router, if several clusters of kvist up run here", minimum=1, maximum=65535
    )
    python: str | None = option(
        None,
        "Python interpreter of the new version, as .venv/bin/python of another environment",
        unset="the one that runs this command",
    )
    order: str = option(
        str(Order.AUTO),
        "whether the new worker starts before the old one stops; auto: it does, unless the worker has a GPU or a "
        "folder (--hicache-persist), which hardly two can share",
        choices=tuple(map(str, Order)),
    )
    start_timeout_s: float = option(
        300.0, "end the upgrade if a new process is not ready after this long", unit="seconds", minimum=1
    )

    @property
    def new_python(self) -> str:
        return self.python or sys.executable
