"""The facts about a machine that the checks need, and what the settings want of it. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

UNLIMITED = -1  # of a limit, as `resource.RLIM_INFINITY`


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """The needs of the settings."""

    model_path: str | None = None
    has_dummy_weights: bool = False
    device: str = "auto"  # auto, cpu or cuda
    tp: int = 1
    num_workers: int = 1
    host_tier_bytes: int = 0  # of each worker; 0: none, or its size is chosen at the start
    max_connections: int = 0
    runtime_dir: str | None = None
    ports: Mapping[str, tuple[str, int]] = field(default_factory=dict)  # by flag: host and port, which is not 0
    store_folder: Path | None = None  # of a file store
    store_bytes: int = 0
    mooncake: str = ""  # the flag that needs Mooncake; empty: none does
    mooncake_master: str | None = None  # HOST:PORT of a master that has to run already
    uses_rdma: bool = False
    checks_torch: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    name: str
    driver: str
    total_bytes: int
    used_bytes: int  # by all processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """The answer of torch in a process of its own; `error` if it cannot be imported, or needs too long."""

    error: str = ""
    version: str = ""
    cuda: str | None = None  # that it was built for
    num_gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder, or the nearest one above it that exists."""

    path: Path
    error: str = ""  # why it cannot be used
    total_bytes: int = 0
    free_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    error: str = ""  # with its remedy
    name: str = ""
    path: str = ""
    num_bytes: int = 0  # of the files with weights
    missing_files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    system: str
    is_linux: bool
    python: tuple[int, int, int]
    num_cores: int
    memory_bytes: int
    free_memory_bytes: int
    gpus: tuple[Gpu, ...]
    gpu_error: str = ""  # why the driver does not answer, if it does not
    torch: Torch | None = None  # None: not asked
    missing_packages: tuple[str, ...] = ()  # that Kvist needs
    runtime: Place
    open_files: tuple[int, int]  # soft and hard limit
    locked_bytes: int  # limit of memory that cannot be swapped, which RDMA needs
    model: Model
    port_errors: Mapping[str, str] = field(default_factory=dict)  # by flag; empty text: free
    store: Place | None = None
    mooncake_error: str = ""  # with its remedy; only if it is wanted
    master_error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One result. `remedy` is a command, or a change of flags."""

    level: str  # ok, warning, error
    subject: str
    text: str
    remedy: str = ""
