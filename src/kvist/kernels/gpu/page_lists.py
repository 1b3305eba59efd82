"""Reads page lists: one program per request. The lists are in host memory, where each read takes microseconds, so a
program reads a thousand pages at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.gpu.launch import has_dependent_launch, wait_for_inputs


@triton.jit
def _read_page_lists(
    lists, rows, lengths, pages, list_stride, page_stride,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    wait_for_inputs(DEPENDENT)
    row = lists + tl.load(rows + request).to(tl.int64) * list_stride
    num_pages = (tl.load(lengths + request) + PAGE_SIZE - 1) // PAGE_SIZE
    for first in range(0, num_pages, BLOCK):
        page = first + tl.arange(0, BLOCK)
        inside = page < num_pages
        tl.store(pages + request * page_stride + page, tl.load(row + page, mask=inside), mask=inside)


def read_page_lists(lists: Tensor, rows: Tensor, lengths: Tensor, page_size: int, pages: Tensor) -> None:
    dependent = has_dependent_launch(pages.device)
    if rows.shape[0]:
        _read_page_lists[(rows.shape[0],)](
            lists, rows, lengths, pages, lists.stride(0), pages.stride(0), page_size, 1024, dependent,
            num_warps=4, launch_pdl=dependent,
        )  # fmt: skip
