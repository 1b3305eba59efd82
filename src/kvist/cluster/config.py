"""How many workers `kvist up` starts. The rest of its options are those of the workers and of the router."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option
from kvist.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    prefill: int = option(1, "prefill workers to start", unit="workers", minimum=0, maximum=64)
    decode: int = option(1, "decode workers to start", unit="workers", minimum=0, maximum=64)
    unified: int = option(0, "workers to start that do both", unit="workers", minimum=0, maximum=64)
    start_timeout_s: float = option(
        300.0, "give up when not everything is ready after this long", unit="seconds", minimum=1
    )

    def __post_init__(self) -> None:
        if (self.prefill == 0) != (self.decode == 0):
            raise ConfigError(
                f"--prefill {self.prefill} --decode {self.decode}: the one is no use without the other; "
                "give both, or --unified N",
                param="prefill",
            )
        if self.num_workers == 0:
            raise ConfigError("--prefill 0 --decode 0 --unified 0 starts nothing: give at least one", param="unified")

    @property
    def num_workers(self) -> int:
        return self.prefill + self.decode + self.unified
