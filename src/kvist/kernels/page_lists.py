"""The pages that a step attends to, read from the page lists of its requests."""

from __future__ import annotations

from torch import Tensor


def read_page_lists(lists: Tensor, rows: Tensor, lengths: Tensor, page_size: int, pages: Tensor) -> None:
    """Fill `pages` for each request of a batch.

    lists [num_rows, max_pages] int32: pinned host memory when the other tensors are on a GPU, which reads it directly.
    rows, lengths [batch] int32: the row of the request's list, and its number of tokens; 0 tokens: a padding row.
    pages [batch, n] int32: receives the pages of the tokens; the entries after them are unchanged or undefined.
    """
    if not pages.is_cuda:
        return read_page_lists_torch(lists, rows, pages)
    from kvist.kernels.gpu import page_lists

    return page_lists.read_page_lists(lists, rows, lengths, page_size, pages)


def read_page_lists_torch(lists: Tensor, rows: Tensor, pages: Tensor) -> None:
    pages.copy_(lists[:, : pages.shape[1]].index_select(0, rows))
