"""The device page pool (L1): one tensor of whole pages, and its size.

Life cycle: `plan_pool_size` decides the number of pages, `DevicePool.create` makes the pool before the first step,
`close` releases the pool when the engine stops. Every pool has a file through which peers on this host access its pages
(transfer/). On a CPU the file is the pool, mapped into memory:

- a peer engine maps the same file and writes granted pages in place,
- tensor-parallel ranks map the file too (`attach`), and each works on its own heads of every page.

The whole file is allocated at the start (0.8 s for a GiB of shared memory on two busy cores): too little space is an
error at that time, and cannot kill the engine later, when it first writes a page.

On CUDA the pool is device memory, and the file contains the handle that opens the memory (cuda_memory.py). Each
tensor-parallel rank has a pool of its own, with its heads of every page; rank 0 also opens the pools of the other ranks
(`join_ranks`, `open_ranks`), for the host tier and for handoffs.

The creator holds an flock on the file while it lives; `create` first removes the files of dead engines
(runtime_dir.py).

kv/cache.py decides which request owns which page.
"""

from __future__ import annotations

import dataclasses
import errno
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvist.errors import ConfigError, EngineError
from kvist.kv.layout import PageLayout
from kvist.memory import cuda_memory
from kvist.memory.runtime_dir import free_bytes, publish_pool, remove_leftovers, room_remedy, runtime_dir
from kvist.own_files import open_own
from kvist.wire import PoolAddress, PoolPart

SHM, CUDA_IPC = "shm", "cuda-ipc"  # how peers reach a pool: `PoolAddress.transport`
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPool:
    """Another rank's pool on a GPU."""

    path: str  # of the pool's file
    device: torch.device
    first_head: int  # in the whole page; each rank has as many heads as rank 0, and ranks may share a head


class DevicePool:
    """Pages of one engine, or of one rank on a GPU. `tensor` is [num_pages, num_kv_heads, num_layers, 2, page_size,
    head_dim]; `whole_layout` is the layout of the engine's pages, with the heads of all ranks."""

    def __init__(
        self,
        *,
        tensor: Tensor,
        layout: PageLayout,
        path: Path,
        lock_fd: int | None,
        mapped: mmap.mmap | None,
        export_error: str = "",
    ) -> None:
        self.tensor = tensor
        self.layout = self.whole_layout = layout
        self.num_pages = int(tensor.shape[0])
        self.export_error = export_error  # why no peer can access the pages; empty if peers can
        self.address = PoolAddress(  # for peers on this host
            transport=CUDA_IPC if mapped is None else SHM,
            location=str(path),
            num_pages=self.num_pages,
            page_bytes=layout.page_bytes,
            layout=layout.describe(),
            device=tensor.device.type,
        )
        self._path = path
        self._lock_fd = lock_fd  # None: attached, not created here
        self._mapped = mapped  # None on CUDA
        self._others: Sequence[RankPool] = ()
        self._opened: list[tuple[int, Tensor]] = []  # the other ranks' pieces (offset in the whole page, memory)

    @classmethod
    def create(
        cls, layout: PageLayout, num_pages: int, *, device: torch.device, directory: Path | None = None
    ) -> DevicePool:
        """Create a pool of zeros, with its file in `directory` (by default the user's `runtime_dir()`).

        Raises `ConfigError` if the pool does not fit.
        """
        directory = runtime_dir(None if directory is None else str(directory))
        remove_leftovers(directory)
        num_bytes = num_pages * layout.page_bytes
        if device.type != "cpu":
            memory = _allocate(num_bytes, device)
            exported = cuda_memory.export(memory)
            path, fd = _publish(directory, lambda fd: os.write(fd, exported.encode()))
            tensor = memory.view(DTYPES[layout.dtype]).view(num_pages, *layout.shape)
            return cls(tensor=tensor, layout=layout, path=path, lock_fd=fd, mapped=None, export_error=exported.error)
        _check_room(directory, num_bytes)
        path, fd = _publish(directory, lambda fd: _take_room(fd, num_bytes))
        return cls._map(fd, layout, num_pages, path=path, lock_fd=fd)

    @classmethod
    def attach(cls, address: PoolAddress, layout: PageLayout) -> DevicePool:
        """Map a pool that another process created. Raises `EngineError` if it is gone or has another layout."""
        if address.transport != SHM or address.layout != layout.describe():
            raise EngineError(f"cannot map pool {address.location}: it is {address.layout}, not {layout.describe()}")
        path = Path(address.location)
        try:
            fd = open_own(path, os.O_RDWR)
        except OSError as error:
            raise EngineError(f"cannot map the page pool {path}: {error}") from error
        try:
            return cls._map(fd, layout, address.num_pages, path=path, lock_fd=None)
        finally:
            os.close(fd)

    @classmethod
    def _map(cls, fd: int, layout: PageLayout, num_pages: int, *, path: Path, lock_fd: int | None) -> DevicePool:
        mapped = mmap.mmap(fd, num_pages * layout.page_bytes)
        flat = torch.frombuffer(mapped, dtype=DTYPES[layout.dtype])
        return cls(tensor=flat.view(num_pages, *layout.shape), layout=layout, path=path, lock_fd=lock_fd, mapped=mapped)

    def join_ranks(self, num_kv_heads: int, others: Sequence[RankPool]) -> None:
        """Add the other ranks' pools to this one, rank 0's. The engine's pages have `num_kv_heads` heads in total."""
        self.whole_layout = dataclasses.replace(self.layout, num_kv_heads=num_kv_heads)
        self._others = others
        part_bytes = self.layout.page_bytes
        places = [(str(self._path), 0), *((other.path, other.first_head * self._head_bytes) for other in others)]
        self.address = msgspec.structs.replace(
            self.address,
            page_bytes=self.whole_layout.page_bytes,
            layout=self.whole_layout.describe(),
            parts=tuple(PoolPart(location=path, offset=offset, num_bytes=part_bytes) for path, offset in places),
        )

    @property
    def has_all_ranks(self) -> bool:
        """Whether this process can access the pages of every rank: always, or after `open_ranks`."""
        return len(self._opened) == len(self._others)

    def open_ranks(self) -> None:
        """Open the memory of the other ranks, until `close`. Takes some memory on each GPU. Raises `EngineError`."""
        if self.has_all_ranks:
            return
        opened: list[tuple[int, Tensor]] = []
        for other in self._others:
            try:
                memory = cuda_memory.open_tensor(Path(other.path).read_bytes(), other.device)
            except EngineError as error:
                raise EngineError(
                    f"rank 0 cannot reach the pages on {other.device}: {error}. Use --tp 1, or --role unified without "
                    "the host tier"
                ) from error
            piece = memory.view(self.num_pages, self.layout.page_bytes)
            opened.append((other.first_head * self._head_bytes, piece))
        self._opened = opened

    def pieces(self) -> list[tuple[int, Tensor]]:
        """Return the pieces of every page: (offset in the whole page, [num_pages, piece bytes] uint8 on a rank's GPU).
        Raises `EngineError` as `open_ranks`."""
        self.open_ranks()
        return [(0, self.tensor.view(self.num_pages, -1).view(torch.uint8)), *self._opened]

    @property
    def _head_bytes(self) -> int:
        return self.layout.page_bytes // self.layout.num_kv_heads

    @property
    def bytes(self) -> npt.NDArray[np.uint8]:
        """Return the pool's memory as [num_pages, page_bytes] uint8. CPU only."""
        if self._mapped is None:
            raise EngineError(f"a page pool on {self.tensor.device} has no bytes on the host")
        return np.frombuffer(self._mapped, dtype=np.uint8).reshape(self.num_pages, self.layout.page_bytes)

    def close(self) -> None:
        """Remove the file. The memory is freed with the last tensor over it and the last peer's mapping."""
        self.tensor = torch.empty(0, dtype=self.tensor.dtype)
        self._opened = []
        self._mapped = None
        if self._lock_fd is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = None


def _allocate(num_bytes: int, device: torch.device) -> Tensor:
    try:
        return cuda_memory.allocate(num_bytes, device)
    except EngineError as error:
        raise ConfigError(
            f"the page pool needs {num_bytes / _GIB:.2f} GiB on {device}: {error.message}; "
            "lower --mem-fraction-static or --max-total-tokens",
            param="mem_fraction_static",
        ) from error


def _publish(directory: Path, fill: Callable[[int], object]) -> tuple[Path, int]:
    try:
        return publish_pool(directory, fill)
    except OSError as error:
        remedy = f": {room_remedy(directory)}" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ConfigError(
            f"cannot create the page pool in {directory}: {error.strerror}{remedy}", param="runtime_dir"
        ) from error


def _take_room(fd: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, num_bytes)
    else:  # macOS: the file stays sparse
        os.ftruncate(fd, num_bytes)


def _check_room(directory: Path, num_bytes: int) -> None:
    free = free_bytes(directory)
    if num_bytes > free:
        raise ConfigError(
            f"the page pool needs {num_bytes / _GIB:.2f} GiB, but {directory} has {free / _GIB:.2f} GiB free: "
            f"{room_remedy(directory)}; or lower --max-total-tokens",
            param="runtime_dir",
        )


# ---------------------------------------------------------------- how many pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The file system for a pool that is a file."""

    free_bytes: int
    directory: Path
    enough_tokens: int  # the fewest tokens of the pool, unless memory or the user's limit allows fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    num_pages: int
    reason: str  # for the log: the limit that decided `num_pages`


def plan_pool_size(
    layout: PageLayout,
    *,
    available_bytes: int,  # before the weights were loaded; on a GPU its total memory, used or not
    weights_bytes: int,
    mem_fraction_static: float,
    free_bytes: int | None = None,  # memory that other processes do not use
    reserve_bytes: int = 0,  # for allocations after the pool: captured graphs
    max_total_tokens: int | None = None,  # set by the user
    cap_tokens: int | None = None,  # the default limit of a device with memory for far more tokens than are useful
    min_tokens: int = 1,  # with fewer the engine could not serve one request
    room: Room | None = None,  # if the pool is a file
) -> PoolSize:
    """Decide the number of pages: weights, reserve and pool together take `mem_fraction_static` of the available
    memory, unless a limit in tokens is lower.

    Raises `ConfigError` if fewer than `min_tokens` fit, if `max_total_tokens` do not fit, or if other processes have
    left too little free memory. The result does not depend on `free_bytes`: workers that share a GPU get the same pools
    in whichever order they start.
    """
    budget_bytes = int(available_bytes * mem_fraction_static) - weights_bytes - reserve_bytes
    fitting = max(0, budget_bytes // layout.page_bytes)
    memory = (
        f"{mem_fraction_static:g} of {available_bytes / _GIB:.2f} GiB less {weights_bytes / _GIB:.2f} GiB of weights"
        + (f" and {reserve_bytes / _GIB:.2f} GiB for CUDA graphs, workspaces and collectives" if reserve_bytes else "")
        + f" holds {fitting} pages"
    )
    num_pages, reason = fitting, memory
    if max_total_tokens is not None:
        num_pages = -(-max_total_tokens // layout.page_size)
        reason = f"--max-total-tokens {max_total_tokens}; {memory}"
        if num_pages > fitting:
            raise ConfigError(f"--max-total-tokens {max_total_tokens}: {memory}", param="max_total_tokens")
    elif cap_tokens is not None and -(-cap_tokens // layout.page_size) < fitting:
        num_pages = -(-cap_tokens // layout.page_size)
        reason = f"default limit of {cap_tokens} tokens (raise it with --max-total-tokens); {memory}"
    if room is not None and num_pages > room.free_bytes // layout.page_bytes:
        num_pages, reason = _in_room(layout, room, num_pages, asked=max_total_tokens is not None)
    if num_pages * layout.page_size < min_tokens:
        asked = max_total_tokens is not None  # memory suffices for it: checked above
        remedy = "--max-total-tokens" if asked else "--mem-fraction-static, or serve a smaller model"
        raise ConfigError(
            f"the page pool would hold {num_pages * layout.page_size} tokens, fewer than {min_tokens} ({reason}): "
            f"raise {remedy}",
            param="max_total_tokens" if asked else "mem_fraction_static",
        )
    wanted_bytes = weights_bytes + reserve_bytes + num_pages * layout.page_bytes
    if free_bytes is not None and wanted_bytes > free_bytes:
        raise ConfigError(
            f"{wanted_bytes / _GIB:.2f} GiB are needed ({reason}), but other processes have left "
            f"{free_bytes / _GIB:.2f} GiB of this GPU free: lower --mem-fraction-static; its sum over all workers of "
            "one GPU must stay below 1",
            param="mem_fraction_static",
        )
    size_gib = num_pages * layout.page_bytes / _GIB
    return PoolSize(
        num_pages=num_pages,
        reason=f"{num_pages * layout.page_size} tokens ({num_pages} pages of {layout.page_size}), {size_gib:.2f} GiB: "
        + reason,
    )


def _in_room(layout: PageLayout, room: Room, wanted_pages: int, *, asked: bool) -> tuple[int, str]:
    """Return the number of pages that fit into the file system, and the reason. Raises `ConfigError` if they are too
    few; with `asked`, if they are fewer than the user has set."""
    fitting = room.free_bytes // layout.page_bytes
    has = f"{room.directory} has {room.free_bytes / _GIB:.2f} GiB free, which hold {fitting * layout.page_size} tokens"
    enough_pages = min(wanted_pages, -(-room.enough_tokens // layout.page_size))
    if asked or fitting < enough_pages:
        needed = wanted_pages if asked else enough_pages
        raise ConfigError(
            f"a page pool of {needed * layout.page_size} tokens needs {needed * layout.page_bytes / _GIB:.2f} GiB, but "
            f"{has}: {room_remedy(room.directory)}; or set --max-total-tokens {fitting * layout.page_size}",
            param="runtime_dir",
        )
    return fitting, has
