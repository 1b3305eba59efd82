"""What a step takes from the page lists of its requests: the pages to attend to."""

from __future__ import annotations

from torch import Tensor


def read_page_lists(lists: Tensor, rows: Tensor, lengths: Tensor, page_size: int, pages: Tensor) -> None:
    """Fills `pages` for each of a batch's requests.

    lists [num_rows, max_pages] int32: with the others on a GPU, pinned memory of the host, which the GPU reads itself.
    rows, lengths [batch] int32: the request's list, and its tokens; 0 tokens: a padding row.
    pages [batch, n] int32: the list, as far as the tokens reach; what lies behind is left as it is or undefined.
    """
    if not pages.is_cuda:
        return read_page_lists_torch(lists, rows, pages)
    from kvist.kernels.gpu import page_lists

    return page_lists.read_page_lists(lists, rows, lengths, page_size, pages)


def read_page_lists_torch(lists: Tensor, rows: Tensor, pages: Tensor) -> None:
    pages.copy_(lists[:, : pages.shape[1]].index_select(0, rows))
