"""The torch twins on a CPU, where they are the production code."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvist.kernels.decode_attention import decode_attention, plan_decodes
from kvist.kernels.operands import ITEM_MULTIPLE, TARGET_ITEMS
from kvist.kernels.sampling import choose_tokens, hash_tokens
from kvist.kernels.skinny import skinny_gated, skinny_linear
from kvist.request import SamplingParams
from kvist.runner.sampler import SamplingRow, columns_of, sample


def test_choose_tokens_equals_the_sampler() -> None:
    logits = torch.randn(12, 9000, generator=torch.Generator().manual_seed(1)) * 2
    logits[6:, ::3] = logits[6:, :1]  # many equal logits
    params = [
        {"temperature": 0.0},
        {"temperature": 0.5},
        {"temperature": 1e-3},
        {"top_k": 50},
        {"temperature": 3.0, "top_p": 0.9},  # beyond the likeliest few thousand tokens
        {"top_k": 700, "top_p": 0.5, "min_p": 0.001},
    ]
    rows = [
        SamplingRow(params=SamplingParams(seed=100 + i, max_tokens=1, **each), position=7 * i)  # type: ignore[arg-type]
        for i, each in enumerate(params + params)
    ]
    columns = columns_of(rows, logits.device)
    assert choose_tokens(logits, columns).tolist() == list(sample(logits, rows).token_ids)


def test_both_words_of_the_key_change_all_31_bits_of_the_hash() -> None:
    tokens = torch.arange(4096)[None, :]
    keys = torch.tensor([[1, 2], [1, 3], [2, 2]], dtype=torch.int32)
    hashed = hash_tokens(keys, tokens)
    assert (hashed >= 0).all()
    for a, b in ((0, 1), (0, 2)):
        assert (hashed[a] != hashed[b]).float().mean() > 0.99
        assert abs(((hashed[a] ^ hashed[b]) & 1).float().mean() - 0.5) < 0.05


def test_skinny_gated_equals_two_products_and_a_gate() -> None:
    x, weight = torch.randn(3, 8), torch.randn(10, 8)
    gate, up = skinny_linear(x, weight, None, torch.float32).chunk(2, dim=-1)
    torch.testing.assert_close(skinny_gated(x, weight), torch.nn.functional.silu(gate) * up)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40))
def test_decode_items_cover_every_context_once_and_are_bounded(lengths: list[int]) -> None:
    items = plan_decodes(torch.tensor(lengths, dtype=torch.int32))
    *firsts, num_items, item_tokens = items.firsts.tolist()
    assert num_items <= len(lengths) + TARGET_ITEMS
    assert item_tokens % ITEM_MULTIPLE == 0
    covered = [0] * len(lengths)
    for item, row in enumerate(items.rows[:num_items].tolist()):
        start = (item - firsts[row]) * item_tokens
        assert start == covered[row], "in order, without gaps"
        covered[row] = min(lengths[row], start + item_tokens)
    assert covered == lengths


def test_decode_attention_equals_softmax_attention_over_the_pages() -> None:
    rng = torch.Generator().manual_seed(3)
    lengths, pages = [5, 0, 9], [[4, 1], [], [0, 3, 2]]
    pool = torch.randn(6, 2, 2, 4, 8, generator=rng)
    pool[5] = float("nan")
    q, out = torch.randn(3, 4, 8, generator=rng), torch.full((3, 4, 8), 7.0)
    table = torch.tensor([row + [5] * (3 - len(row)) for row in pages], dtype=torch.int32)
    decode_attention(q, pool, table, plan_decodes(torch.tensor(lengths, dtype=torch.int32)), out)
    for row in (0, 2):
        for head in range(4):
            keys, values = (
                torch.cat([pool[page, head // 2, kind] for page in pages[row]])[: lengths[row]] for kind in (0, 1)
            )
            want = torch.softmax(keys @ q[row, head] / 8**0.5, dim=0) @ values
            torch.testing.assert_close(out[row, head], want)
    assert (out[1] == 7.0).all(), "a row without a context is not written"
