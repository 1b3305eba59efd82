"""The GPU's choice of tokens, with truncation and shaped logits, against its torch twin."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvist.kernels.operands import (
    ANY_TOKEN,
    BANS,
    BIAS,
    NO_HISTORY,
    PENALTIES,
    WORDS,
    SamplingColumns,
    ShapedRows,
    ShapingTables,
)
from kvist.kernels.sampling import choose_tokens, choose_tokens_torch, gumbel_noise
from kvist.kernels.shaping import TableSizes, make_tables, shape_logits_torch
from kvist.kernels.truncation import truncation_floors_torch

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
VOCAB_SIZE = 152_064
TRUNCATIONS = {
    "top_k": {"top_k": 50},
    "one": {"top_k": 1},
    "wide top_k": {"top_k": 5000},
    "top_p": {"top_p": 0.9},
    "narrow top_p": {"top_p": 0.01},
    "min_p": {"min_p": 0.02},
    "top_k and top_p": {"top_k": 50, "top_p": 0.95},
    "wide top_k and top_p": {"top_k": 3000, "top_p": 0.7},
    "the likeliest alone": {"top_k": 50, "min_p": 1.0},
    "all": {"top_k": 100, "top_p": 0.9, "min_p": 0.03},
}


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def columns(
    rng: torch.Generator,
    num_rows: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> SamplingColumns:
    return SamplingColumns(
        temperatures=torch.full((num_rows,), temperature),
        keys=torch.randint(-(2**31), 2**31 - 1, (num_rows, 2), dtype=torch.int32, generator=rng),
        top_k=torch.full((num_rows,), top_k, dtype=torch.int32),
        top_p=torch.full((num_rows,), top_p),
        reach=torch.full((num_rows,), temperature * math.log(min_p) if min_p else -math.inf),
    )


def join(parts: list[SamplingColumns]) -> SamplingColumns:
    names = ("temperatures", "keys", "top_k", "top_p", "reach")
    return SamplingColumns(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def on_gpu(given: SamplingColumns) -> SamplingColumns:
    names = ("temperatures", "keys", "top_k", "top_p", "reach")
    return SamplingColumns(**{name: getattr(given, name).to(CUDA) for name in names})


def choose_on_gpu(logits: Tensor, given: SamplingColumns) -> Tensor:
    return choose_tokens(logits.to(CUDA), on_gpu(given)).cpu()


def assert_kept(chosen: Tensor, logits: Tensor, given: SamplingColumns) -> None:
    """Each chosen token is one that the twin keeps, and the twin chooses a token that is better by rounding at most."""
    shifted = logits.float() - logits.float().amax(dim=-1, keepdim=True)
    floors = truncation_floors_torch(shifted, given)
    assert (shifted.gather(1, chosen[:, None]) >= floors).all(), "a token outside the truncation was chosen"
    scaled = shifted / given.temperatures[:, None] + gumbel_noise(given.keys, torch.arange(logits.shape[1])[None, :])
    scaled = scaled.masked_fill(shifted < floors, float("-inf"))
    of_chosen = scaled.gather(1, chosen[:, None]).squeeze(1)
    torch.testing.assert_close(of_chosen, scaled.amax(dim=-1), rtol=1e-4, atol=1e-4)
    assert (chosen == scaled.argmax(dim=-1)).float().mean() > 0.95


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("truncation", TRUNCATIONS.values(), ids=TRUNCATIONS)
def test_truncated_rows_choose_among_the_tokens_that_the_twin_keeps(
    rng: torch.Generator, truncation: dict[str, float], temperature: float, spread: float
) -> None:
    logits = torch.randn(16, VOCAB_SIZE, generator=rng) * spread
    given = columns(rng, 16, temperature=temperature, **truncation)  # type: ignore[arg-type]
    assert_kept(choose_on_gpu(logits, given), logits, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [211, 49_153, VOCAB_SIZE])
def test_rows_of_all_kinds_share_a_batch(rng: torch.Generator, vocab_size: int, dtype: torch.dtype) -> None:
    """In 16 bits many logits are equal, so that more tokens lie between the cuts than the list holds."""
    kinds = [{"temperature": 0.0}, {}, {"temperature": 1e-6, "top_p": 0.5}, *TRUNCATIONS.values()]
    given = join([columns(rng, 4, **kind) for kind in kinds])  # type: ignore[arg-type]
    logits = torch.randn(4 * len(kinds), vocab_size, generator=rng).to(dtype)
    chosen = choose_on_gpu(logits, given)
    assert chosen[:4].tolist() == logits[:4].float().argmax(dim=-1).tolist()
    assert_kept(chosen[4:], logits[4:], given.select(torch.arange(4, len(logits))))


@pytest.mark.parametrize("spread", [0.0, 1e-3])
def test_a_row_whose_cut_has_too_many_tokens_for_the_list_reads_its_logits_again(
    rng: torch.Generator, spread: float
) -> None:
    logits = torch.randn(6, VOCAB_SIZE, generator=rng) * spread
    given = join([columns(rng, 2, top_p=0.3), columns(rng, 2, top_k=9000), columns(rng, 2, top_k=9000, top_p=0.3)])
    assert_kept(choose_on_gpu(logits, given), logits, given)


def test_equal_logits_at_the_cut_are_kept_together(rng: torch.Generator) -> None:
    logits = torch.full((4000, 3000), -50.0)
    logits[:, [5, 2100, 2999]] = 3.0
    logits[:, 7] = 4.0
    chosen = choose_on_gpu(logits, columns(rng, 4000, top_k=2))
    assert sorted(set(chosen.tolist())) == [5, 7, 2100, 2999]


def test_the_same_tokens_are_chosen_in_every_run_and_at_every_place_of_a_batch(rng: torch.Generator) -> None:
    kinds = [{"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {"top_k": 4000, "top_p": 0.5}]
    given = join([columns(rng, 8, **kind) for kind in kinds])  # type: ignore[arg-type]
    logits = torch.randn(24, VOCAB_SIZE, generator=rng)
    first = choose_on_gpu(logits, given)
    order = torch.randperm(24, generator=rng)
    for _ in range(5):
        assert torch.equal(choose_on_gpu(logits[order], given.select(order)), first[order])


@pytest.mark.parametrize("truncation", [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_a_truncated_row_with_nan_gets_no_token(rng: torch.Generator, truncation: dict[str, float]) -> None:
    logits = torch.randn(5, 5000, generator=rng)
    given = columns(rng, 5, **truncation)  # type: ignore[arg-type]
    logits[1, 4999], logits[2, 2048], logits[3] = float("nan"), float("inf"), float("-inf")
    chosen = choose_on_gpu(logits, given)
    assert chosen[1:4].tolist() == [-1] * 3
    kept = torch.tensor([0, 4])
    assert_kept(chosen[kept], logits[kept], given.select(kept))


def sizes(num_slots: int, vocab_size: int, context_len: int) -> TableSizes:
    return TableSizes(
        num_slots=num_slots,
        vocab_size=vocab_size,
        context_len=context_len,
        max_biases=64,
        max_words=256,
        max_word_tokens=8,
    )


def random_tables(rng: torch.Generator, num_slots: int, vocab_size: int, context_len: int) -> ShapingTables:
    tables = make_tables(sizes(num_slots, vocab_size, context_len), torch.device("cpu"))
    used = torch.rand(tables.counts.shape, generator=rng) < 0.3
    tables.counts.copy_(torch.where(used, torch.randint(0, 5, used.shape, generator=rng), 0))
    in_prompt = torch.rand(tables.counts.shape, generator=rng) < 0.2
    tables.counts[in_prompt] |= torch.iinfo(tables.counts.dtype).min
    tables.banned.copy_(torch.randint(-(2**31), 2**31 - 1, tables.banned.shape, generator=rng))
    tables.penalties.copy_(torch.tensor([1.3, 0.7, 0.4]))
    tables.bias_ids.fill_(-1)
    for slot in range(num_slots):
        tables.bias_ids[slot, :60] = torch.randperm(vocab_size, generator=rng)[:60].int()
        tables.bias_values[slot, :60] = torch.randn(60, generator=rng) * 5
    tables.recent.copy_(torch.randint(0, 3, tables.recent.shape, generator=rng))
    tables.recent[:, 5:] = NO_HISTORY
    tables.words.fill_(ANY_TOKEN)
    tables.words[:, 0, :40] = torch.randint(0, vocab_size, (num_slots, 40), dtype=torch.int32, generator=rng)
    tables.words[:, 1:3, :40] = torch.randint(0, 3, (num_slots, 2, 40), dtype=torch.int32, generator=rng)
    return tables


def tables_to(tables: ShapingTables, device: torch.device) -> ShapingTables:
    names = ("counts", "banned", "penalties", "bias_ids", "bias_values", "words", "recent")
    return ShapingTables(**{name: getattr(tables, name).to(device, copy=True) for name in names})


@pytest.mark.parametrize("context_len", [1000, 100_000])
@pytest.mark.parametrize("vocab_size", [211, 49_153])
def test_shaped_logits_and_recorded_tokens_equal_the_torch_twin(
    rng: torch.Generator, vocab_size: int, context_len: int
) -> None:
    flags = torch.tensor([0, BANS, PENALTIES, BIAS, WORDS, BANS | PENALTIES | BIAS | WORDS, 0, PENALTIES | WORDS])
    flags = flags.to(torch.int32)
    num_rows = len(flags)
    slots = torch.tensor([3, 1, 0, 2, 7, 4, num_rows, 5], dtype=torch.int32)  # row 6 is padding
    tables = random_tables(rng, num_rows, vocab_size, context_len)
    on_device = tables_to(tables, CUDA)
    given = replace(columns(rng, num_rows), temperatures=torch.tensor([0.0, 1.0] * 4))
    logits = torch.randn(num_rows, vocab_size, generator=rng) * 3
    got = logits.to(CUDA)
    chosen = choose_tokens(got, on_gpu(given), ShapedRows(tables=on_device, slots=slots.to(CUDA), flags=flags.to(CUDA)))
    rows = ShapedRows(tables=tables, slots=slots, flags=flags)
    assert torch.equal(got.cpu(), shape_logits_torch(logits, rows))
    assert torch.equal(choose_tokens_torch(logits, given, rows), chosen.cpu())
    for name in ("counts", "recent", "banned", "words", "bias_ids", "penalties"):
        assert torch.equal(getattr(on_device, name).cpu(), getattr(tables, name)), name


def test_a_row_with_every_token_banned_or_with_nan_gets_no_token_and_records_none(rng: torch.Generator) -> None:
    tables = make_tables(sizes(3, 5000, 1000), CUDA)
    tables.banned[0].fill_(-1)
    tables.banned[1, 0] = 1 << 9
    tables.penalties.copy_(torch.tensor([1.0, 0.5, 0.0]))
    tables.recent.fill_(NO_HISTORY)
    logits = torch.randn(3, 5000, generator=rng)
    logits[1, 9] = float("nan")  # of a banned token
    rows = ShapedRows(
        tables=tables,
        slots=torch.arange(3, dtype=torch.int32, device=CUDA),
        flags=torch.full((3,), BANS | PENALTIES | WORDS, dtype=torch.int32, device=CUDA),
    )
    tables.words.fill_(ANY_TOKEN)
    chosen = choose_tokens(logits.to(CUDA), on_gpu(columns(rng, 3)), rows)
    assert chosen[:2].tolist() == [-1, -1]
    assert tables.counts.sum() == 1
    assert tables.recent[:, 0].tolist() == [NO_HISTORY, NO_HISTORY, int(chosen[2])]


def test_a_replayed_graph_counts_the_tokens_that_it_chose(rng: torch.Generator) -> None:
    """Greedy tokens under a strong penalty: each replay must choose a token that was not chosen before."""
    tables = make_tables(sizes(2, 5000, 1000), CUDA)
    tables.penalties.copy_(torch.tensor([1.0, 0.0, 100.0]))
    logits = torch.randn(2, 5000, generator=rng).to(CUDA)
    shaped = ShapedRows(
        tables=tables,
        slots=torch.tensor([1, 0], dtype=torch.int32, device=CUDA),
        flags=torch.full((2,), PENALTIES, dtype=torch.int32, device=CUDA),
    )
    given = on_gpu(columns(rng, 2, temperature=0.0))
    choose_tokens(logits.clone(), given, shaped)  # compiles
    tables.counts.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = choose_tokens(logits.clone(), given, shaped)
    expected = logits.sort(dim=-1, descending=True).indices
    for number in range(4):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(chosen, expected[:, number])
