"""What the twins promise on a CPU, where they are the code that runs."""

from __future__ import annotations

import torch

from kvist.kernels.sampling import choose_tokens, hash_tokens
from kvist.kernels.skinny import skinny_gated, skinny_linear
from kvist.request import SamplingParams
from kvist.runner.sampler import SamplingRow, noise_keys, sample


def test_choosing_tokens_is_what_the_sampler_does() -> None:
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(1)) * 3
    rows = [
        SamplingRow(params=SamplingParams(temperature=t, seed=100 + i, max_tokens=1), position=7 * i)
        for i, t in enumerate([0.0, 0.5, 1.0, 1.0, 2.0, 1e-3])
    ]
    temperatures = torch.tensor([row.params.temperature for row in rows])
    keys = noise_keys(rows, logits.device)
    assert choose_tokens(logits, temperatures, keys).tolist() == [token.token_id for token in sample(logits, rows)]


def test_the_hash_has_31_bits_that_both_words_of_the_key_change() -> None:
    tokens = torch.arange(4096)[None, :]
    keys = torch.tensor([[1, 2], [1, 3], [2, 2]], dtype=torch.int32)
    hashed = hash_tokens(keys, tokens)
    assert (hashed >= 0).all()
    for a, b in ((0, 1), (0, 2)):
        assert (hashed[a] != hashed[b]).float().mean() > 0.99
        assert abs(((hashed[a] ^ hashed[b]) & 1).float().mean() - 0.5) < 0.05


def test_gated_is_the_two_products_and_their_gate() -> None:
    x, weight = torch.randn(3, 8), torch.randn(10, 8)
    gate, up = skinny_linear(x, weight, None, torch.float32).chunk(2, dim=-1)
    torch.testing.assert_close(skinny_gated(x, weight), torch.nn.functional.silu(gate) * up)
