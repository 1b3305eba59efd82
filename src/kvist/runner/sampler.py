"""Samples the next tokens: a pure function of (logits, parameters, seed, position), row by row.

The order is: suppress, temperature, top_k, top_p, min_p, then argmax(logits + Gumbel noise), which draws from the
softmax of the remaining tokens. The noise of a token is a hash of (seed, position, token id), never generator state. A
row thus gives the same token in any batch, on any worker, after any interruption.

Rows with the same kind of work are computed together: greedy rows are one argmax; without truncation there is no sort;
top_k reads k tokens; top_p reads the likeliest few hundred tokens, and the whole vocabulary only for a row with a wider
nucleus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvist.kernels.sampling import choose_tokens, gumbel_noise, nucleus_floor, without_broken_rows
from kvist.plan.events import SampledTokens
from kvist.request import SamplingParams
from kvist.runner.logprobs import LogprobRow, LogprobTensors, on_device, token_logprobs

_NUCLEUS_FIRST_TRY = 256  # tokens
_NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    params: SamplingParams
    position: int  # of the token to be sampled; the counter of its noise
    suppressed_token_ids: tuple[int, ...] = ()


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> SampledTokens:
    """Sample one token for each row of `logits` [num_rows, vocab_size], fp32. Does not change `logits`."""
    chosen = choose(logits, rows)
    return sampled_tokens(chosen, compute_logprobs(logits, rows, chosen))


def sampled_tokens(chosen: Tensor, logprobs: LogprobTensors | None) -> SampledTokens:
    token_ids: list[int] = chosen.tolist()
    broken = frozenset[int]()
    if token_ids and min(token_ids) < 0:  # NO_TOKEN
        broken = frozenset(place for place, token_id in enumerate(token_ids) if token_id < 0)
    return SampledTokens(
        token_ids=token_ids, logprobs={} if logprobs is None else logprobs.by_row(), invalid_rows=broken
    )


def is_plain(params: SamplingParams) -> bool:
    """Return whether temperature and noise alone choose the tokens, as in `kernels.sampling.choose_tokens`."""
    truncates = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
    return params.num_logprobs is None and (params.greedy or not truncates)


def choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return [num_rows] int64 token ids, NO_TOKEN for a row with NaN or an infinite maximum. On a GPU the host does not
    wait."""
    assert logits.shape[0] == len(rows)
    if all(row.params.greedy and not row.suppressed_token_ids for row in rows):
        return without_broken_rows(logits.argmax(dim=-1), logits)
    return without_broken_rows(_choose(_suppress(logits, rows), rows), logits)


def _suppress(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    vocab_size = logits.shape[1]
    # A client may send any integer as a stop token id; an id outside the vocabulary cannot be sampled anyway.
    places = [i * vocab_size + t for i, row in enumerate(rows) for t in row.suppressed_token_ids if 0 <= t < vocab_size]
    if not places:
        return logits
    suppressed = logits.clone(memory_format=torch.contiguous_format)
    suppressed.view(-1).index_fill_(0, on_device(places, torch.int64, logits.device), _NEG_INF)
    return suppressed


@dataclass(frozen=True, slots=True)
class _Kind:
    """Rows of one kind are computed together. top_k is each row's own and not the maximum over rows: ties at rank k
    must not depend on the other rows of the batch."""

    greedy: bool
    top_k: int = 0
    nucleus: bool = False


def _kind(row: SamplingRow, vocab_size: int) -> _Kind:
    params = row.params
    if params.greedy:
        return _Kind(greedy=True)
    top_k = params.top_k if 0 < params.top_k < vocab_size else 0
    return _Kind(greedy=False, top_k=top_k, nucleus=params.top_p < 1.0)


def _choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    members: dict[_Kind, list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault(_kind(row, logits.shape[1]), []).append(index)
    chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for kind, indices in members.items():
        places = on_device(indices, torch.int64, logits.device)
        part = logits if len(indices) == len(rows) else logits.index_select(0, places)
        tokens = part.argmax(dim=-1) if kind.greedy else _draw(part, kind, [rows[i] for i in indices])
        chosen.index_copy_(0, places, tokens)
    return chosen


def _draw(logits: Tensor, kind: _Kind, rows: Sequence[SamplingRow]) -> Tensor:
    """Return [num_rows] token ids, for rows that are all of `kind`."""
    # Shift the likeliest token to 0, so that a tiny temperature does not overflow.
    temperature = _column([row.params.temperature for row in rows], logits)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if scaled.is_cuda and not kind.top_k:
        return _draw_on_gpu(scaled, kind, rows)
    if kind.nucleus and not kind.top_k:
        return _draw_from_nucleus(scaled, rows)
    if not kind.top_k:
        return _pick(scaled, _all_tokens(scaled), rows)
    values, token_ids = scaled.topk(kind.top_k, dim=-1)
    if kind.nucleus:
        values = _cut_nucleus(values, values.logsumexp(dim=-1, keepdim=True), rows)
    return _pick(values, token_ids, rows)


def _draw_from_nucleus(scaled: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    log_total = scaled.logsumexp(dim=-1, keepdim=True)
    values, token_ids = scaled.topk(min(_NUCLEUS_FIRST_TRY, scaled.shape[1]), dim=-1)
    tokens = _pick(_cut_nucleus(values, log_total, rows), token_ids, rows)
    if values.shape[1] == scaled.shape[1]:
        return tokens
    covered = (values - log_total).exp().sum(dim=-1).tolist()
    wide = [i for i, (mass, row) in enumerate(zip(covered, rows, strict=True)) if mass < row.params.top_p]
    if wide:
        tokens[wide] = _draw_from_wide_nucleus(scaled[wide], log_total[wide], [rows[i] for i in wide])
    return tokens


def _draw_from_wide_nucleus(scaled: Tensor, log_total: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    probabilities = (scaled - log_total).exp()
    outside = probabilities < _nucleus_floor(probabilities, rows)
    return _pick(scaled.masked_fill(outside, _NEG_INF), _all_tokens(scaled), rows)


def _draw_on_gpu(scaled: Tensor, kind: _Kind, rows: Sequence[SamplingRow]) -> Tensor:
    """Apply top_p and min_p as one lower bound of the probabilities, so that the host need not read any value."""
    if kind.nucleus or any(row.params.min_p > 0.0 for row in rows):
        probabilities = scaled.softmax(dim=-1)
        floor = _column([row.params.min_p for row in rows], scaled) * probabilities.amax(dim=-1, keepdim=True)
        if kind.nucleus:
            floor = torch.maximum(floor, _nucleus_floor(probabilities, rows))
        scaled = scaled.masked_fill(probabilities < floor, _NEG_INF)
    temperatures = torch.ones(len(rows), device=scaled.device)  # `scaled` is already divided by the temperature
    return choose_tokens(scaled, temperatures, noise_keys(rows, scaled.device))


def _nucleus_floor(probabilities: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return [num_rows, 1]: the probability of the least likely token in each row's nucleus."""
    return nucleus_floor(probabilities, _column([row.params.top_p for row in rows], probabilities))


def _all_tokens(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device)[None, :]


def _pick(values: Tensor, token_ids: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Apply min_p, noise and argmax. `values` [num_rows, n] of `token_ids` [num_rows or 1, n]; -inf: never sampled."""
    if any(row.params.min_p > 0 for row in rows):
        floors = [math.log(row.params.min_p) if row.params.min_p > 0 else _NEG_INF for row in rows]
        values = values.masked_fill(values < _column(floors, values), _NEG_INF)
    best = (values + gumbel_noise(noise_keys(rows, values.device), token_ids)).argmax(dim=-1, keepdim=True)
    return token_ids.expand(values.shape).gather(1, best).squeeze(1)


def _column(values: list[float], like: Tensor) -> Tensor:
    return on_device(values, torch.float32, like.device)[:, None]


def _cut_nucleus(values: Tensor, log_total: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Keep the fewest of `values`, sorted from the likeliest, whose probabilities reach top_p; at least one."""
    probabilities = (values - log_total).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    cut = before >= _column([row.params.top_p for row in rows], values)
    cut[:, 0] = False
    return values.masked_fill(cut, _NEG_INF)


# ---------------------------------------------------------------- noise


def noise_keys(rows: Sequence[SamplingRow], device: torch.device) -> Tensor:
    """Return the result of `noise_key_words` on the device, [num_rows, 2] int32."""
    keys = torch.from_numpy(noise_key_words([row.params.seed for row in rows], [row.position for row in rows]))
    return keys.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else keys


def noise_key_words(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.int32]:
    """Return [num_rows, 2]: the low and the high word of each row's 64-bit key, a hash of seed and position."""
    return key_words_at(hash_seeds(seeds), np.array(positions, dtype=np.uint64))


def hash_seeds(seeds: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Return the part of each key that does not depend on the position."""
    return _mix_64(np.array(seeds, dtype=np.uint64) ^ np.uint64(0x9E3779B97F4A7C15))


def key_words_at(hashed_seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    keys = _mix_64(hashed_seeds + positions)
    return keys.astype("<u8", copy=False).view("<i4").reshape(-1, 2)


def _mix_64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The splitmix64 finaliser: every input bit changes every output bit half the time."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# ---------------------------------------------------------------- logprobs


def compute_logprobs(logits: Tensor, rows: Sequence[SamplingRow], chosen: Tensor) -> LogprobTensors | None:
    """Return the logprobs of the chosen tokens. None: no row asks for logprobs."""
    wanted = [
        LogprobRow(place, row.params.num_logprobs, row.params.logprob_token_ids)
        for place, row in enumerate(rows)
        if row.params.num_logprobs is not None
    ]
    return token_logprobs(logits, wanted, chosen.clamp(min=0)) if wanted else None  # NO_TOKEN is below 0
