"""Launches gated.cu, and chooses how many rows of x a tile has."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kvist.kernels.gpu.cuda import CudaKernel, compile_cubin, map_tensor

TILE_ROWS, DEPTH = 192, 64  # of the weight, as in gated.cu
TOKENS = (32, 48, 64, 80, 96, 112, 128)  # per CTA, half a tile; each size is a separate kernel
MAX_ROWS = 2 * TOKENS[-1]  # above, cuBLAS with its larger tiles is faster in spite of the separate gate
MIN_USE = 0.85  # minimum use of the clusters over all rounds; below, cuBLAS is faster: it has more tile sizes
_THREADS = 512
_SHARED_BYTES, _ALIGNMENT = 231_000, 1024
_HALF = {torch.bfloat16: "bf16", torch.float16: "f16"}


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("num_tokens", "num_outputs", "blocks", "tiles")]


def _stage_bytes(tokens: int) -> int:
    return (TILE_ROWS + tokens) * DEPTH * 2


def _stages(tokens: int) -> int:
    return (_SHARED_BYTES - _ALIGNMENT) // _stage_bytes(tokens)


def source(tokens: int, dtype: torch.dtype) -> str:
    count, half = tokens // 2, _HALF[dtype]
    registers = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""#define TOKENS {tokens}
#define STAGES {_stages(tokens)}
#define HALF "{half}"
__device__ void multiply(float (&d)[{count}], unsigned long long a, unsigned long long b, int add) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{half}.{half} "
        "{{{registers}}}, %{count}, %{count + 1}, p, 1, 1, 0, 0;\\n}}" : {sums} : "l"(a), "l"(b), "r"(add));
}}
{Path(__file__).with_suffix(".cu").read_text()}"""


def fills_gpu(num_rows: int, max_clusters: int) -> bool:
    """Return whether the tiles of `num_rows` rows of the weight fill the clusters that run at the same time."""
    tiles = -(-num_rows // TILE_ROWS)
    return tiles >= MIN_USE * -(-tiles // max_clusters) * max_clusters


@cache
def _kernels(dtype: torch.dtype, device: torch.device) -> tuple[dict[int, CudaKernel], int]:
    """Return the kernels by tokens per CTA, and how many clusters run at the same time."""
    with ThreadPoolExecutor(len(TOKENS)) as pool, torch.cuda.device(device):
        cubins = pool.map(lambda tokens: compile_cubin(source(tokens, dtype), "sm_90a"), TOKENS)
        kernels = {}
        for tokens, cubin in zip(TOKENS, cubins, strict=True):
            shared_bytes = _stages(tokens) * _stage_bytes(tokens) + _ALIGNMENT
            kernels[tokens] = CudaKernel(cubin, "gated", num_threads=_THREADS, shared_bytes=shared_bytes)
        return kernels, min(kernel.max_clusters(2) for kernel in kernels.values())


class GatedProduct:
    """The gated product of one weight. Immutable."""

    def __init__(self, weight: Tensor) -> None:
        num_rows, num_columns = weight.shape
        self._weight = weight  # keeps the memory of the map alive
        # Rows in groups of 16: 8 of the first half and the same 8 of the second.
        sizes, strides = (
            (num_columns, 8, 2, num_rows // 16),
            (num_columns, num_rows // 2 * num_columns, 8 * num_columns),
        )
        self._map = map_tensor(weight, sizes, strides, (DEPTH, 8, 2, TILE_ROWS // 2 // 16))
        self._kernels, self._max_clusters = _kernels(weight.dtype, weight.device)
        self._tiles = -(-num_rows // TILE_ROWS)
        self._fits = fills_gpu(num_rows, self._max_clusters)

    def __call__(self, x: Tensor) -> Tensor | None:
        (num_tokens, num_in), num_outputs = x.shape, self._weight.shape[0] // 2
        if not (self._fits and 0 < num_tokens <= MAX_ROWS):
            return None
        assert x.stride(1) == 1, "a row of x is contiguous"
        assert (x.stride(0) % 8, x.data_ptr() % 16) == (0, 0), "the copy engine needs this alignment"
        out = torch.empty((num_tokens, num_outputs), dtype=x.dtype, device=x.device)
        tokens = next(tokens for tokens in TOKENS if 2 * tokens >= num_tokens)
        shape = _Shape(num_tokens, num_outputs, -(-num_in // DEPTH), self._tiles)
        x_map = map_tensor(x, (num_in, num_tokens), (x.stride(0),), (DEPTH, tokens))
        arguments = (self._map, x_map, ctypes.c_void_p(out.data_ptr()), shape)
        self._kernels[tokens].launch(2 * min(self._max_clusters, self._tiles), arguments)
        return out
