"""CUDA C++ without a CUDA toolkit: compiled by the NVRTC library that torch includes, launched through the driver
library.

For the few kernels that Triton cannot express; a kernel without headers compiles in a fraction of a second. Every
function raises `RuntimeError` with the library's error message.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_DTYPES = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
_SWIZZLE_128B, _PROMOTE_256B = 3, 3
_MAX_DYNAMIC_SHARED, _PROGRAMMATIC_SERIALIZATION = 8, 6  # CUfunction_attribute, CUlaunchAttributeID


class _LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


TensorMap = ctypes.c_uint64 * 16  # describes a tensor to the copy engine
_MAP_ALIGNMENT = 64


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()}")


@cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    return ctypes.CDLL(f"libnvrtc.so.{major}")  # torch has loaded it


@cache
def missing_library() -> str | None:
    """Return the error of loading the libraries, or None when both are present."""
    try:
        _driver(), _nvrtc()
    except OSError as error:
        return str(error)
    return None


def compile_cubin(source: str, architecture: str) -> bytes:
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture={architecture}".encode(), b"--std=c++17")
    nvrtc, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None):
        raise RuntimeError("NVRTC cannot create the program")
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if failed:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC: {log.value.decode()}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def map_tensor(
    data: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> ctypes.Array[ctypes.c_uint64]:
    """Describe to the copy engine how to read boxes of `data`, with 128 bytes of a row swizzled. Dimensions are ordered
    innermost first; strides, in elements, omit the innermost, which is 1."""
    rank = len(sizes)
    room = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + _MAP_ALIGNMENT)
    made = TensorMap.from_buffer(room, -ctypes.addressof(room) % _MAP_ALIGNMENT)
    _check(
        _driver().cuTensorMapEncodeTiled(
            ctypes.byref(made), _DTYPES[data.dtype], rank, ctypes.c_void_p(data.data_ptr()),
            (ctypes.c_uint64 * rank)(*sizes),
            (ctypes.c_uint64 * (rank - 1))(*(stride * data.element_size() for stride in strides)),
            (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
            0, _SWIZZLE_128B, _PROMOTE_256B, 0,
        )
    )  # fmt: skip
    return made


class CudaKernel:
    """One compiled kernel on the current device. Immutable."""

    def __init__(self, cubin: bytes, name: str, *, num_threads: int, shared_bytes: int) -> None:
        torch.cuda.current_stream()  # makes the device's context current
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._num_threads, self._shared_bytes = num_threads, shared_bytes
        _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin))
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()))
        _check(_driver().cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared_bytes))

    def max_clusters(self, cluster_size: int) -> int:
        """Return how many clusters of this kernel run at the same time."""
        count, config = ctypes.c_int(), self._config(cluster_size, None)
        _check(_driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), self._function, ctypes.byref(config)))
        return count.value

    def launch(self, num_programs: int, arguments: Sequence[ctypes._CData], *, dependent: bool = True) -> None:
        """Launch the kernel; `dependent`: with a programmatic dependency on the previous kernel (launch.py)."""
        attribute = _LaunchAttribute(id=_PROGRAMMATIC_SERIALIZATION)
        attribute.value[0] = 1
        config = self._config(num_programs, attribute if dependent else None)
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, addresses, None))

    def _config(self, num_programs: int, attribute: _LaunchAttribute | None) -> _LaunchConfig:
        config = _LaunchConfig(
            grid=(num_programs, 1, 1), block=(self._num_threads, 1, 1), shared_bytes=self._shared_bytes,
            stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        if attribute is not None:
            config.attributes, config.num_attributes = ctypes.pointer(attribute), 1
        return config
