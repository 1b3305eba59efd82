"""GPU memory that other processes of this host may map: allocate, export, open (CUDA IPC).

The memory is not taken from torch's allocator: a handle gives access to a whole allocation, and torch would put other
tensors into the same allocation, or compose it of pieces that cannot be exported (expandable segments). Here a pool is
one allocation, which is freed with the last tensor over it.

The handle is in the pool's file (device_pool.py), as an `ExportedMemory`. Memory that another process has opened stays
mapped until that process closes it, even after the exporting process has ended. transfer/ opens the pools of peers;
device_pool.py opens the pools of other ranks.

The calls go through ctypes to the CUDA runtime that torch has loaded; the runtime is not loaded before the first pool
on a GPU.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache

import msgspec
import torch
from torch import Tensor

from kvist.errors import UNDECODABLE, ConfigError, EngineError

HANDLE_BYTES = 64
_GRANULE_BYTES = 2 << 20  # of the driver: smaller allocations share one granule, and would be exported together
_LAZY_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t, passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


_SIGNATURES: dict[str, tuple[object, ...]] = {
    "cudaMalloc": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t),
    "cudaFree": (ctypes.c_void_p,),
    "cudaIpcGetMemHandle": (ctypes.POINTER(_Handle), ctypes.c_void_p),
    "cudaIpcOpenMemHandle": (ctypes.POINTER(ctypes.c_void_p), _Handle, ctypes.c_uint),
    "cudaIpcCloseMemHandle": (ctypes.c_void_p,),
    "cudaGetLastError": (),
    "cudaGetErrorString": (ctypes.c_int,),
}


@cache
def _runtime() -> ctypes.CDLL:
    """Load the CUDA runtime. Raises `ConfigError` if torch was built without NVIDIA's runtime."""
    name = f"libcudart.so.{(torch.version.cuda or 'none').partition('.')[0]}"
    try:
        library = ctypes.CDLL(name)  # found by its name alone, because torch has loaded it
    except OSError as error:
        raise ConfigError(f"pages on a GPU need the CUDA runtime {name} that torch loads: {error}") from error
    for function, arguments in _SIGNATURES.items():
        getattr(library, function).argtypes = arguments
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


def _call(function: str, *arguments: object) -> None:
    """Call a function of the CUDA runtime. Raises `EngineError` with CUDA's message."""
    runtime = _runtime()
    if status := getattr(runtime, function)(*arguments):
        runtime.cudaGetLastError()  # reset: otherwise torch's next kernel on this thread would report this error
        raise EngineError(f"{function}: {runtime.cudaGetErrorString(status).decode()} ({status})")


class _Allocation:
    """Memory that torch can make a tensor from. Every tensor over the memory keeps this object, and `owner`, alive."""

    def __init__(self, address: int, num_bytes: int, owner: object = None) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def allocate(num_bytes: int, device: torch.device) -> Tensor:
    """Return [num_bytes] uint8 zeros in an allocation of its own. Raises `EngineError` if too little memory is free."""
    rounded_bytes = -(-num_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
    address = ctypes.c_void_p()
    with torch.cuda.device(device):
        _call("cudaMalloc", ctypes.byref(address), rounded_bytes)
        assert address.value is not None
        allocation = _Allocation(address.value, num_bytes)
        weakref.finalize(allocation, _runtime().cudaFree, address).atexit = False  # at exit the driver frees it
        return torch.as_tensor(allocation, device=device).zero_()


class ExportedMemory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The handle by which other processes open an allocation; `read_export` undoes `encode`."""

    num_bytes: int
    handle: bytes  # HANDLE_BYTES; empty if the memory cannot be exported
    error: str = ""  # why the memory cannot be exported

    def encode(self) -> bytes:
        return msgspec.json.encode(self)


def export(memory: Tensor) -> ExportedMemory:
    """Export memory from `allocate`. Without CUDA IPC (WSL, some virtual machines) the result has an `error`."""
    handle = _Handle()
    try:
        with torch.cuda.device(memory.device):
            _call("cudaIpcGetMemHandle", ctypes.byref(handle), memory.data_ptr())
    except EngineError as error:
        return ExportedMemory(num_bytes=memory.nbytes, handle=b"", error=error.message)
    return ExportedMemory(num_bytes=memory.nbytes, handle=bytes(handle))


def read_export(content: bytes) -> ExportedMemory:
    """Decode an `ExportedMemory`. Raises `EngineError` for content that `encode` cannot have written."""
    try:
        exported = msgspec.json.decode(content, type=ExportedMemory)
    except UNDECODABLE as error:
        raise EngineError(f"the file does not describe GPU memory: {error}") from error
    if len(exported.handle) != (0 if exported.error else HANDLE_BYTES):
        raise EngineError(f"a GPU memory handle has {HANDLE_BYTES} bytes, this one has {len(exported.handle)}")
    return exported


class OpenedMemory:
    """Another process's allocation on any GPU, mapped for `device`. Unmapped with the last reference.

    Raises `EngineError` if the exporting process has ended or is this process, or if `device` cannot reach the other
    GPU's memory.
    """

    def __init__(self, handle: bytes, device: torch.device) -> None:
        address = ctypes.c_void_p()
        with torch.cuda.device(device):
            _call(
                "cudaIpcOpenMemHandle",
                ctypes.byref(address),
                _Handle.from_buffer_copy(handle),
                _LAZY_ENABLE_PEER_ACCESS,
            )
        assert address.value is not None
        self.address = address.value
        weakref.finalize(self, _close, address, device).atexit = False


def open_tensor(content: bytes, device: torch.device) -> Tensor:
    """Open [num_bytes] uint8 of another process on `device`; `content` encodes its `ExportedMemory`.

    Raises `EngineError`."""
    exported = read_export(content)
    if exported.error:
        raise EngineError(exported.error)
    memory = OpenedMemory(exported.handle, device)
    return torch.as_tensor(_Allocation(memory.address, exported.num_bytes, memory), device=device)


def _close(address: ctypes.c_void_p, device: torch.device) -> None:
    with torch.cuda.device(device):
        _runtime().cudaIpcCloseMemHandle(address)
