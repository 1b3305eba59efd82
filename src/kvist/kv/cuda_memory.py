"""GPU memory that may be handed to another process of this host: allocated, exported, opened (CUDA IPC).

It is not torch's allocator's: a handle names a whole allocation, and torch would put other tensors into the same one,
or build it of pieces that cannot be exported at all (expandable segments). Here a pool is one allocation, freed with
the last tensor over it.

A handle travels in the pool's file (kv/device.py) as an `ExportedMemory`. What another process opened stays mapped, and
its memory exists, until that process closes it, whatever became of the maker. Who may open what, and for how long, is
transfer/'s affair.

The CUDA runtime that torch has loaded is called through ctypes; nothing is imported before the first pool on a GPU.
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
_GRANULE_BYTES = 2 << 20  # the driver's own: smaller allocations share one, and would be exported together
_LAZY_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t, which is passed by value."""

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
    """Raises `ConfigError` where torch was built without CUDA's own runtime."""
    name = f"libcudart.so.{(torch.version.cuda or 'none').partition('.')[0]}"
    try:
        library = ctypes.CDLL(name)  # found by its name, because torch has it loaded
    except OSError as error:
        raise ConfigError(f"pages on a GPU need CUDA's runtime {name} as torch loads it: {error}") from error
    for function, arguments in _SIGNATURES.items():
        getattr(library, function).argtypes = arguments
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


def _call(function: str, *arguments: object) -> None:
    """Raises `EngineError` with CUDA's words."""
    runtime = _runtime()
    if status := getattr(runtime, function)(*arguments):
        runtime.cudaGetLastError()  # else torch's next kernel on this thread would be blamed for it
        raise EngineError(f"{function}: {runtime.cudaGetErrorString(status).decode()} ({status})")


class _Allocation:
    """What torch makes a tensor of, and keeps for as long as there is one. `owner`: what must live as long."""

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
    """[num_bytes] uint8, zero, in an allocation of its own. Raises `EngineError` when there is no such memory."""
    rounded_bytes = -(-num_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
    address = ctypes.c_void_p()
    with torch.cuda.device(device):
        _call("cudaMalloc", ctypes.byref(address), rounded_bytes)
        assert address.value is not None
        allocation = _Allocation(address.value, num_bytes)
        weakref.finalize(allocation, _runtime().cudaFree, address).atexit = False  # the driver does that better
        return torch.as_tensor(allocation, device=device).zero_()


class ExportedMemory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What other processes need to open an allocation; `read_export` undoes `encode`."""

    num_bytes: int
    handle: bytes  # HANDLE_BYTES; nothing when it cannot be exported
    error: str = ""  # why it cannot

    def encode(self) -> bytes:
        return msgspec.json.encode(self)


def export(memory: Tensor) -> ExportedMemory:
    """Of what `allocate` made. Not every system has CUDA IPC: WSL has not, nor do some virtual machines."""
    handle = _Handle()
    try:
        with torch.cuda.device(memory.device):
            _call("cudaIpcGetMemHandle", ctypes.byref(handle), memory.data_ptr())
    except EngineError as error:
        return ExportedMemory(num_bytes=memory.nbytes, handle=b"", error=error.message)
    return ExportedMemory(num_bytes=memory.nbytes, handle=bytes(handle))


def read_export(content: bytes) -> ExportedMemory:
    """Raises `EngineError` for what `encode` cannot have written."""
    try:
        exported = msgspec.json.decode(content, type=ExportedMemory)
    except UNDECODABLE as error:
        raise EngineError(f"it does not describe GPU memory: {error}") from error
    if len(exported.handle) != (0 if exported.error else HANDLE_BYTES):
        raise EngineError(f"a handle has {HANDLE_BYTES} bytes, this one {len(exported.handle)}")
    return exported


class OpenedMemory:
    """Another process's allocation, mapped for `device`, on whichever GPU it is. Unmapped with the last reference.

    Raises `EngineError`: its maker is gone or is this very process, or the two GPUs do not reach each other's memory.
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
    """[num_bytes] uint8 of another process on that very GPU; `content`: its `ExportedMemory`. Raises `EngineError`."""
    exported = read_export(content)
    if exported.error:
        raise EngineError(exported.error)
    memory = OpenedMemory(exported.handle, device)
    return torch.as_tensor(_Allocation(memory.address, exported.num_bytes, memory), device=device)


def _close(address: ctypes.c_void_p, device: torch.device) -> None:
    with torch.cuda.device(device):
        _runtime().cudaIpcCloseMemHandle(address)
