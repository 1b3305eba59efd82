"""The sampler: its distribution, truncation against a plain reference, and independence of all other rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvist.kernels.sampling import gumbel_noise
from kvist.plan.events import SampledTokens
from kvist.request import SamplingParams
from kvist.runner.sampler import SamplingRow, noise_keys, sample


def row(position: int = 0, **params: object) -> SamplingRow:
    sampling = SamplingParams(max_tokens=1, **params)  # type: ignore[arg-type]
    return SamplingRow(params=sampling, position=position)


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def tokens(result: SampledTokens) -> list[int]:
    return list(result.token_ids)


def draw(logits: Tensor, count: int, *, by: str = "position", **params: object) -> Tensor:
    """Count each token in `count` draws that differ in position, or in seed."""
    num_rows = 4000
    counts = torch.zeros(logits.numel(), dtype=torch.int64)
    for start in range(0, count, num_rows):
        numbers = range(start, start + num_rows)
        rows = [row(n, seed=7, **params) if by == "position" else row(3, seed=n, **params) for n in numbers]
        counts += torch.tensor(tokens(sample(logits.expand(num_rows, -1), rows))).bincount(minlength=logits.numel())
    return counts


def reference_distribution(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """Compute the distribution by definition, one token at a time, in double precision."""
    weights = {i: math.exp((x - max(logits.tolist())) / temperature) for i, x in enumerate(logits.tolist())}
    order = sorted(weights, key=lambda i: -weights[i])
    if top_k:
        order = order[:top_k]
    total = sum(weights[i] for i in order)
    nucleus: list[int] = []
    mass = 0.0
    for i in order:
        if nucleus and mass / total >= top_p:
            break
        nucleus.append(i)
        mass += weights[i]
    kept = [i for i in nucleus if weights[i] >= min_p * weights[nucleus[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


def assert_fits(counts: Tensor, expected: list[float]) -> None:
    """Chi-square test at about 5 sigma; the seeds are fixed, so the result never changes."""
    total = int(counts.sum())
    pairs = [(n, total * p) for n, p in zip(counts.tolist(), expected, strict=True)]
    assert all(n == 0 for n, mean in pairs if mean == 0), "a token outside the truncation was sampled"
    used = [(n, mean) for n, mean in pairs if mean >= 5]
    chi_square = sum((n - mean) ** 2 / mean for n, mean in used)
    freedom = len(used) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5, f"{chi_square:.1f} at {freedom} degrees of freedom"


@pytest.mark.parametrize("by", ["position", "seed"])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.05, "temperature": 1.3},
    ],
    ids=str,
)
def test_sampled_frequencies_equal_the_softmax_after_truncation(by: str, params: dict[str, float]) -> None:
    logits = random_logits(1, 60, seed=3)[0]
    assert_fits(draw(logits, 40_000, by=by, **params), reference_distribution(logits, **params))  # type: ignore[arg-type]


def test_a_nucleus_wider_than_the_first_topk_is_cut_at_the_right_token() -> None:
    logits = random_logits(1, 900, seed=5, spread=0.3)[0]
    expected = reference_distribution(logits, top_p=0.7)
    assert sum(p > 0 for p in expected) > 300
    assert_fits(draw(logits, 20_000, top_p=0.7), expected)


def test_noise_at_neighbouring_positions_is_independent() -> None:
    logits = torch.zeros(8)
    drawn = torch.tensor(tokens(sample(logits.expand(20_001, -1), [row(n, seed=1) for n in range(20_001)])))
    assert_fits((drawn[:-1] * 8 + drawn[1:]).bincount(minlength=64), [1 / 64] * 64)


def test_noise_of_neighbouring_seeds_is_independent() -> None:
    logits = torch.zeros(8)
    drawn = torch.tensor(tokens(sample(logits.expand(20_001, -1), [row(0, seed=n) for n in range(20_001)])))
    assert_fits((drawn[:-1] * 8 + drawn[1:]).bincount(minlength=64), [1 / 64] * 64)


def test_noise_has_the_moments_of_gumbel_over_a_large_vocabulary() -> None:
    keys = noise_keys([row(n, seed=5) for n in range(8)], torch.device("cpu"))
    noise = gumbel_noise(keys, torch.arange(150_000)[None, :]).double()
    assert bool(noise.isfinite().all())
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    assert float(noise.max()) > 11  # the tail is present: about log(1.2 million)
    correlation = torch.corrcoef(noise)
    assert float((correlation - torch.eye(8)).abs().max()) < 0.02


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    position=st.integers(0, 2**20),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    vocab_size=st.sampled_from([2, 50, 700]),
    spread=st.sampled_from([0.01, 2.0, 10.0]),
)
def test_the_sampled_token_is_among_the_tokens_after_truncation(
    seed: int,
    position: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    vocab_size: int,
    spread: float,
) -> None:
    logits = random_logits(1, vocab_size, seed=position, spread=spread)
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    (token,) = tokens(sample(logits, [row(position, seed=seed, **params)]))
    assert reference_distribution(logits[0], **params)[token] > 0  # type: ignore[arg-type]


def mixed_rows() -> list[SamplingRow]:
    return [
        row(9, temperature=0.0),
        row(9, seed=1),
        row(9, seed=1, temperature=0.5),
        row(10, seed=1, top_k=3),
        row(10, seed=2, top_k=40),
        row(11, seed=3, top_p=0.9),
        row(11, seed=3, top_p=0.9, temperature=4.0),  # a nucleus wider than the first top-k
        row(12, seed=3, min_p=0.1),
        row(13, seed=4, top_k=50, top_p=0.6, min_p=0.02),
        row(14, seed=6, top_k=50, top_p=0.9, temperature=4.0),
        row(15, seed=9, num_logprobs=3),
    ]


def test_a_row_samples_the_same_token_in_any_batch() -> None:
    rows = mixed_rows()
    logits = random_logits(len(rows), 2000, seed=8)
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [rows[i]]).row(0)[0] for i in range(len(rows))]
    assert tokens(together) == [token.token_id for token in alone]
    order = [3, 8, 6, 0, 10, 5, 1, 9, 2, 4, 7]
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert tokens(shuffled) == [alone[i].token_id for i in order]


def test_seed_and_position_both_change_the_sampled_token() -> None:
    logits = torch.zeros(1, 50_000)
    drawn = {tokens(sample(logits, [row(p, seed=s)]))[0] for p in range(5) for s in (0, 1, 2**62, 2**63 - 1)}
    assert len(drawn) == 20


def test_greedy_sampling_is_argmax_and_does_not_change_the_logits() -> None:
    logits = random_logits(4, 100)
    before = logits.clone()
    rows = [row(temperature=0.0), row(temperature=0.0), row(seed=1), row(seed=1, top_p=0.5)]
    assert tokens(sample(logits, rows))[0] == int(logits[0].argmax())
    assert torch.equal(logits, before)


def test_logprobs_are_of_the_unmodified_distribution_in_the_requested_number() -> None:
    logits = random_logits(3, 500, seed=4)
    rows = [
        row(temperature=0.0, num_logprobs=0),
        row(seed=2, temperature=3.0, top_k=9, num_logprobs=4),
        row(seed=2),
    ]
    [first], [second], [third] = sample(logits, rows).rows()
    expected = logits.double().log_softmax(dim=-1)
    assert first.logprobs is not None
    assert second.logprobs is not None
    assert third.logprobs is None
    assert first.logprobs.top_token_ids == ()
    assert first.logprobs.logprob == pytest.approx(float(expected[0].max()), abs=1e-5)
    assert second.logprobs.logprob == pytest.approx(float(expected[1, second.token_id]), abs=1e-5)
    values, ids = expected[1].topk(4)
    assert second.logprobs.top_token_ids == tuple(ids.tolist())
    assert second.logprobs.top_logprobs == pytest.approx(values.tolist(), abs=1e-5)
