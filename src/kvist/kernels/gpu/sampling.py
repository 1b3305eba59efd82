"""Chooses tokens in two or three passes over the logits, each split over many programs a row:

    find the largest of each group ─► rows that truncate: fill bins, ─► best score of each group, ─► best token
    of logits, and shape them         find cuts                         list the tokens at the cuts   of each row
    (shaping.py)                      (truncation.py)

The best token of a group is found without a logarithm for each token: the bits of a random number give an upper bound
of its noise, and few bounds exceed the best exact score. The hash equals the hash in kernels/sampling.py, bit for bit.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from kvist.kernels.gpu.cuda import CudaKernel, compile_cubin, missing_library
from kvist.kernels.gpu.launch import has_dependent_launch
from kvist.kernels.gpu.shaping import GROUP, shape_and_find_maxima
from kvist.kernels.gpu.truncation import BINS, FIRST_BIN, MAX_LISTED, SHIFT, WEIGHT_BITS, Cuts, find_cuts, find_highest
from kvist.kernels.operands import PENALTIES, WORDS, SamplingColumns, ShapedRows

_CHUNK, _THREADS = 16_384, 256  # logits and threads of a program
_NOISE_SPAN = 25.5  # the noise is in [-2.9, 22.2]
_CONSTANTS = {
    "CHUNK": _CHUNK, "GROUP": GROUP, "THREADS": _THREADS, "SPAN": f"{_NOISE_SPAN}f",
    "BINS": BINS, "FIRST_BIN": FIRST_BIN, "SHIFT": SHIFT, "WEIGHT_BITS": WEIGHT_BITS, "MAX_LISTED": MAX_LISTED,
    "PENALTIES": PENALTIES, "WORDS": WORDS,
}  # fmt: skip
_LOGITS = {
    torch.float32: ("float", "x"),
    torch.bfloat16: ("unsigned short", "__uint_as_float(static_cast<unsigned>(x) << 16)"),
}
_COUNTS = {torch.int16: "short", torch.int32: "int"}
_KERNELS = ("fill_bins", "score_tokens", "choose_best")


class _Rows(ctypes.Structure):
    """`Rows` of sampling.cu."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("row_stride", ctypes.c_longlong),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "maxima", "temperatures", "keys", "top_k", "top_p", "reach", "highest", "bounds", "counts", "weights",
                "cut_bins", "cut_weights", "num_listed", "listed_bits", "listed_tokens", "best", "best_token", "chosen",
                "slots", "flags", "occurrences", "recent",
            )
        ),
        *((name, ctypes.c_int) for name in ("vocab_size", "num_maxima", "num_chunks", "word_tokens")),
    ]  # fmt: skip


def source(logits: torch.dtype, counts: torch.dtype) -> str:
    logit, as_float = _LOGITS[logits]
    constants = _CONSTANTS | {"LOGIT": logit, "COUNT": _COUNTS[counts]}
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    to_float = f"__device__ float to_float(LOGIT x) {{ return {as_float}; }}\n"
    return defines + to_float + Path(__file__).with_suffix(".cu").read_text()


@cache
def _kernels(logits: torch.dtype, counts: torch.dtype, device: torch.device) -> tuple[CudaKernel, ...]:
    if (problem := missing_library()) is not None:
        raise RuntimeError(f"sampling on a GPU needs the NVRTC library that torch includes: {problem}. Reinstall torch")
    major, minor = torch.cuda.get_device_capability(device)
    cubin = compile_cubin(source(logits, counts), f"sm_{major}{minor}")
    with torch.cuda.device(device):
        return tuple(CudaKernel(cubin, name, num_threads=_THREADS, shared_bytes=0) for name in _KERNELS)


class _Buffers:
    """The intermediate results for R rows; all are written before they are read."""

    def __init__(self, num_rows: int, num_maxima: int, device: torch.device) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(num_rows, *shape, dtype=dtype, device=device)

        self.highest, self.bounds = empty(dtype=torch.float32), empty(dtype=torch.float32)
        self.counts, self.weights = empty(BINS), empty(BINS, dtype=torch.int64)
        self.cuts = Cuts(bins=empty(4), weights=empty(3, dtype=torch.float64), num_listed=empty())
        self.listed_bits, self.listed_tokens = empty(MAX_LISTED), empty(MAX_LISTED)
        self.best, self.best_token = empty(num_maxima, dtype=torch.float32), empty(num_maxima)
        self.chosen = empty(dtype=torch.int64)


def choose_tokens(logits: Tensor, columns: SamplingColumns, shaped: ShapedRows | None) -> Tensor:
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1, "a row of logits is contiguous"
    device, dependent = logits.device, has_dependent_launch(logits.device)
    if not num_rows:
        return torch.empty(0, dtype=torch.int64, device=device)
    maxima = shape_and_find_maxima(logits, shaped)
    num_maxima, num_chunks = maxima.shape[1], triton.cdiv(vocab_size, _CHUNK)
    made = _Buffers(num_rows, num_maxima, device)
    rows = _rows(logits, maxima, columns, shaped, made, num_chunks)
    counts = torch.int16 if shaped is None else shaped.tables.counts.dtype
    fill_bins, score_tokens, choose_best = _kernels(logits.dtype, counts, device)
    find_highest[(num_rows,)](
        maxima, num_maxima, vocab_size, columns.temperatures, columns.top_k, columns.top_p,
        made.highest, made.bounds, made.counts, made.weights,
        triton.next_power_of_2(num_maxima), dependent, launch_pdl=dependent,
    )  # fmt: skip
    fill_bins.launch(num_rows * num_chunks, (rows,), dependent=dependent)
    find_cuts[(num_rows,)](
        vocab_size, columns.temperatures, columns.top_k, columns.top_p, made.highest, made.counts, made.weights,
        *made.cuts, dependent, launch_pdl=dependent,
    )  # fmt: skip
    score_tokens.launch(num_rows * num_chunks, (rows,), dependent=dependent)
    choose_best.launch(num_rows, (rows,), dependent=dependent)
    return made.chosen


def _rows(
    logits: Tensor, maxima: Tensor, columns: SamplingColumns, shaped: ShapedRows | None, made: _Buffers, num_chunks: int
) -> _Rows:
    tables = None if shaped is None else shaped.tables
    pointers = (
        maxima, columns.temperatures, columns.keys, columns.top_k, columns.top_p, columns.reach,
        made.highest, made.bounds, made.counts, made.weights, *made.cuts, made.listed_bits, made.listed_tokens,
        made.best, made.best_token, made.chosen,
        None if shaped is None else shaped.slots,
        None if shaped is None else shaped.flags,
        None if tables is None else tables.counts,
        None if tables is None else tables.recent,
    )  # fmt: skip
    return _Rows(
        logits.data_ptr(), logits.stride(0), *(None if each is None else each.data_ptr() for each in pointers),
        logits.shape[1], maxima.shape[1], num_chunks, 0 if tables is None else tables.recent.shape[1],
    )  # fmt: skip
