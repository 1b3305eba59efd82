"""Truncates distributions: top_k, then top_p, then min_p, as one floor for the logits of each row.

Logits are shifted, so that the largest of a row is 0. A token is kept if its shifted logit is at least the row's floor,
so tokens that are equally likely are kept or dropped together:

    top_k   the k-th largest logit
    top_p   the largest logit such that it and all larger ones have at least top_p of the probability that top_k kept
    min_p   temperature * log(min_p), since the likeliest token has the logit 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvist.kernels.operands import SamplingColumns

_NEG_INF = float("-inf")


def truncation_floors_torch(shifted: Tensor, columns: SamplingColumns) -> Tensor:
    """shifted [R, V] fp32 -> floors [R, 1] fp32, by sorting."""
    return floors_of_likeliest(shifted.sort(dim=-1, descending=True).values, shifted, columns)[0]


def floors_of_likeliest(values: Tensor, shifted: Tensor, columns: SamplingColumns) -> tuple[Tensor, Tensor]:
    """Return floors [R, 1] fp32 from the n largest `values` [R, n] of `shifted` [R, V], in descending order, and
    [R] bool: whether these values suffice to find the row's floor and every token that it keeps."""
    num_values, vocab_size = values.shape[1], shifted.shape[1]
    top_k = columns.top_k.long()[:, None]
    is_off = (top_k == 0) | (top_k >= vocab_size)
    kth = values.gather(1, torch.where(is_off, 1, top_k).clamp(max=num_values) - 1)
    kth = torch.where(is_off, _NEG_INF, kth)
    floors = torch.maximum(kth, columns.reach[:, None])
    floors = torch.maximum(floors, _nucleus_floors(values, kth, shifted, columns))
    if num_values == vocab_size:
        return floors, torch.ones_like(top_k.squeeze(1), dtype=torch.bool)
    last = values[:, -1:]  # tokens as likely as the last one may be missing, and a k-th one beyond it
    return floors, ((floors > last) & (is_off | (kth > last))).squeeze(1)


def _nucleus_floors(values: Tensor, kth: Tensor, shifted: Tensor, columns: SamplingColumns) -> Tensor:
    """Return [R, 1]: the least likely of `values` in each nucleus, or -inf where they do not reach it or top_p is 1."""
    temperatures = torch.where(columns.temperatures > 0, columns.temperatures, 1.0)[:, None].double()
    top_p = columns.top_p[:, None].double()
    if not bool((top_p < 1).any()):
        return torch.full_like(kth, _NEG_INF)
    weights = torch.where(values >= kth, (values.double() / temperatures).exp(), 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    if values.shape[1] < shifted.shape[1]:
        whole = (shifted / temperatures.float()).exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
        total = torch.where(kth == _NEG_INF, whole, total)
    reached = weights.cumsum(dim=-1) >= top_p * total
    first = reached.to(torch.int8).argmax(dim=-1, keepdim=True)
    is_reached = reached.any(dim=-1, keepdim=True) & (top_p < 1)
    return torch.where(is_reached, values.gather(1, first), _NEG_INF)
