"""Tokens under penalties, bias and bans, step by step and after replay, equal those of the plain reference sampler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvist.kernels.shaping import record_tokens_torch, shape_logits_torch
from kvist.plan.batch import BatchItem, StartRequest
from kvist.request import TABLE_BAD_WORD_TOKENS, SamplingParams, SlotId
from kvist.runner.sampler import SamplingRow, choose, sample
from kvist.runner.shaping import SlotShaping, table_sizes
from tests.budget import budget
from tests.runner.reference_sampler import next_token

VOCAB_SIZE = 40
NUM_SLOTS = 3
token_ids = st.integers(0, VOCAB_SIZE - 1)
tokens_of = st.lists(token_ids, min_size=1, max_size=8)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    words = draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple), max_size=6))
    if draw(st.booleans()):  # the host looks for the words
        words.append(tuple(range(TABLE_BAD_WORD_TOKENS + 1)))
    return SamplingParams(
        max_tokens=20,
        temperature=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 5, 1000])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9, 0.3])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.07])),
        seed=draw(st.integers(0, 2**63 - 1)),
        min_tokens=draw(st.sampled_from([0, 3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.5, -1.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.25])),
        logit_bias=tuple(draw(st.dictionaries(token_ids, st.sampled_from([-100.0, -1.5, 2.0, 100.0]))).items()),
        allowed_token_ids=tuple(draw(st.one_of(st.just([]), st.lists(token_ids, min_size=4)))),
        bad_words=tuple(words),
    )


def make_shaping(vocab_size: int = VOCAB_SIZE) -> SlotShaping:
    return SlotShaping(table_sizes(NUM_SLOTS, vocab_size=vocab_size, context_len=4096), torch.device("cpu"))


def logits_at(position: int, seed: int) -> Tensor:
    """A quarter of the logits are equal, so ties occur at every border; the tokens of bad words are likely."""
    values = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(position + 1000 * (seed % 1000)))
    values[::4] = values[0]
    values[:10] += 2.0
    return values


class Request:
    """One request that the test drives through a slot, as an engine does."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], suppressed: Sequence[int]) -> None:
        self.params, self.prompt, self.output = params, list(prompt), list[int]()
        self.suppressed, self.suppress_until = suppressed, len(prompt) + params.min_tokens

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    def start(self, slot: int) -> StartRequest:
        return StartRequest(
            slot=SlotId(slot),
            request_id="r",  # type: ignore[arg-type]
            sampling=self.params,
            token_ids=self.tokens,
            num_prompt_tokens=len(self.prompt),
            suppressed_token_ids=tuple(self.suppressed),
            suppress_until=self.suppress_until if len(self.tokens) < self.suppress_until else 0,
        )

    def item(self, slot: int) -> BatchItem:
        position = len(self.tokens) - 1
        return BatchItem(slot=SlotId(slot), token_ids=self.tokens[-1:], start=position, page_ids=(), samples=True)

    def reference(self, logits: Tensor) -> int | None:
        suppressed = set(self.suppressed) if len(self.tokens) < self.suppress_until else set()
        return next_token(logits.tolist(), self.params, prompt=self.prompt, output=self.output, suppressed=suppressed)


def step(shaping: SlotShaping, requests: dict[int, Request], logits: Tensor) -> list[int]:
    """Sample a token for each request, in the order of the slots."""
    items = [request.item(slot) for slot, request in requests.items()]
    shaping.answers.accept_known(items)
    shaping.before_choice(items, shaping.answers.followed(items))
    shaped_rows = shaping.rows(list(requests))
    shaped = shape_logits_torch(logits, shaped_rows)
    rows = [SamplingRow(params=each.params, position=len(each.tokens)) for each in requests.values()]
    chosen = choose(shaped, rows)
    record_tokens_torch(chosen, shaped_rows)
    return chosen.tolist()


@settings(max_examples=budget(60, long=3000), deadline=None)
@given(
    all_params=st.lists(sampling_params(), min_size=1, max_size=NUM_SLOTS),
    prompts=st.lists(tokens_of, min_size=NUM_SLOTS, max_size=NUM_SLOTS),
    suppressed=st.lists(token_ids, max_size=3),
    replays=st.sets(st.integers(1, 9)),
    stale=sampling_params(),
)
def test_tokens_equal_the_reference_step_by_step_and_after_replay(
    all_params: list[SamplingParams],
    prompts: list[list[int]],
    suppressed: list[int],
    replays: set[int],
    stale: SamplingParams,
) -> None:
    shaping = make_shaping()
    for slot in range(NUM_SLOTS):  # an earlier request leaves its state behind
        shaping.open(Request(stale, [1, 2, 3], [4]).start(slot))
        shaping.close(SlotId(slot))
    requests = {slot: Request(params, prompts[slot], suppressed) for slot, params in enumerate(all_params)}
    for slot, request in requests.items():
        shaping.open(request.start(slot))
    for number in range(10):
        if number in replays:  # preempted and resumed, in another slot
            for slot in requests:
                shaping.close(SlotId(slot))
            requests = {(slot + 1) % NUM_SLOTS: request for slot, request in requests.items()}
            for slot, request in requests.items():
                shaping.open(request.start(slot))
        logits = torch.stack([logits_at(number, request.params.seed) for request in requests.values()])
        before = logits.clone()
        expected = [request.reference(row) for request, row in zip(requests.values(), logits, strict=True)]
        got = step(shaping, requests, logits)
        assert got == [-1 if token is None else token for token in expected]
        assert torch.equal(logits, before), "logprobs are computed from the model's own logits"
        for request, token in zip(requests.values(), got, strict=True):
            request.output.append(max(token, 0))


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0])
def test_a_suppressed_token_is_not_sampled_before_min_tokens(temperature: float) -> None:
    shaping = make_shaping()
    params = SamplingParams(max_tokens=5, min_tokens=2, temperature=temperature)
    request = Request(params, [1], [4, 99_999, -1])  # a model may name an end token outside its vocabulary
    shaping.open(request.start(0))
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 4] = 50.0
    for _ in range(3):
        request.output += step(shaping, {0: request}, logits)
    assert [token == 4 for token in request.output] == [False, False, True]


def test_logprobs_are_of_the_logits_before_they_are_shaped() -> None:
    shaping = make_shaping()
    params = SamplingParams(max_tokens=5, temperature=0.0, bad_words=((4,),), num_logprobs=1)
    shaping.open(Request(params, [1], []).start(0))
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 4] = 50.0
    [[token]] = sample(logits, [SamplingRow(params=params, position=1)], shaping.rows([0])).rows()
    assert token.token_id != 4
    assert token.logprobs is not None
    assert token.logprobs.top_token_ids == (4,)


def test_a_request_without_features_has_no_flags_and_its_logits_are_not_copied() -> None:
    shaping = make_shaping()
    request = Request(SamplingParams(max_tokens=5, temperature=0.7, top_k=3), [1, 2], [7])
    shaping.open(request.start(1))
    assert shaping.flags[1] == 0
    logits = torch.randn(1, VOCAB_SIZE)
    shaped = shape_logits_torch(logits, shaping.rows([1]))
    assert shaped is logits


@pytest.mark.parametrize("num_repeats", [1, 32_767])
def test_counts_are_exact_up_to_the_longest_output(num_repeats: int) -> None:
    shaping = SlotShaping(table_sizes(1, vocab_size=9, context_len=num_repeats + 1), torch.device("cpu"))
    params = SamplingParams(max_tokens=num_repeats, temperature=0.0, frequency_penalty=0.001)
    request = Request(params, [3], [])
    request.output = [3] * num_repeats
    shaping.open(request.start(0))
    shaped = shape_logits_torch(torch.zeros(1, 9), shaping.rows([0]))
    assert shaped[0, 3] == -np.float32(0.001) * np.float32(num_repeats)
    assert shaping.tables.counts.dtype is torch.int16
    larger = table_sizes(1, vocab_size=9, context_len=num_repeats + 2)
    assert larger.counts_dtype is (torch.int16 if num_repeats == 1 else torch.int32)


def test_nan_is_found_in_a_row_whose_other_tokens_are_banned() -> None:
    shaping = make_shaping()
    request = Request(SamplingParams(max_tokens=5, temperature=0.0, allowed_token_ids=(3,), bad_words=((2,),)), [1], [])
    shaping.open(request.start(0))
    logits = torch.zeros(1, VOCAB_SIZE)
    assert step(shaping, {0: request}, logits) == [3]
    logits[0, 2] = float("nan")
    assert step(shaping, {0: request}, logits) == [-1]
