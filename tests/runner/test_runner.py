"""The tokens do not depend on how the work is split: whole, in chunks, after a cached prefix, in any batch, on any
engine."""

from __future__ import annotations

import msgspec
import pytest
import torch

from kvist.plan.batch import BatchItem
from kvist.request import RequestId, SampledToken, SamplingParams, SlotId
from tests.runner.hand_driven import PlainEngine
from tests.runner.reference_sampler import next_token

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, num_logprobs=2)
SEEDED = SamplingParams(max_tokens=10, temperature=0.9, top_p=0.95, seed=77, num_logprobs=2)
BOTH = pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
PAGE = 4
LENGTHS = [1, 3, 4, 5, 8, 15, 16, 17, 33]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = torch.randint(211, (length,), generator=torch.Generator().manual_seed(seed + length)).tolist()
    return tokens


def assert_same(left: list[SampledToken], right: list[SampledToken]) -> None:
    assert [token.token_id for token in left] == [token.token_id for token in right]
    for a, b in zip(left, right, strict=True):
        assert a.logprobs is not None
        assert b.logprobs is not None
        assert a.logprobs.logprob == pytest.approx(b.logprobs.logprob, abs=1e-4)
        assert a.logprobs.top_logprobs == pytest.approx(b.logprobs.top_logprobs, abs=1e-4)


@BOTH
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_prefill_gives_the_tokens_of_a_whole_prefill(
    engine: PlainEngine, length: int, sampling: SamplingParams
) -> None:
    prompt = prompt_of(length)
    whole = engine.generate(prompt, sampling)
    for size in (1, 3, 4, 5, 16):
        chunks = [min(size, length - start) for start in range(0, length, size)]
        assert_same(engine.generate(prompt, sampling, chunks=chunks), whole)


@pytest.mark.parametrize("bad_words", [((9,), (3, 3), (3, 4)), ((3,) * 9, (4,) * 9)], ids=["short", "long"])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 3, "top_k": 20}], ids=str)
def test_shaped_tokens_are_those_of_the_reference_sampler(
    engine: PlainEngine, params: dict[str, float], bad_words: tuple[tuple[int, ...], ...]
) -> None:
    """Logprobs of the whole vocabulary are the model's logits, shifted: only repetition_penalty would differ."""
    sampling = SamplingParams(
        max_tokens=25,
        num_logprobs=211,
        frequency_penalty=0.02,
        presence_penalty=0.5,
        logit_bias=((3, 12.0), (4, 9.0)),
        allowed_token_ids=(3, *range(0, 211, 2)),
        bad_words=bad_words,
        **params,  # type: ignore[arg-type]
    )
    prompt = prompt_of(7)
    output, num_changed = list[int](), 0
    for token in engine.generate(prompt, sampling):
        assert token.logprobs is not None
        by_id = dict(zip(token.logprobs.top_token_ids, token.logprobs.top_logprobs, strict=True))
        logits = [by_id[token_id] for token_id in range(211)]
        assert token.token_id == next_token(logits, sampling, prompt=prompt, output=output)
        without = msgspec.structs.replace(sampling, bad_words=())
        num_changed += token.token_id != next_token(logits, without, prompt=prompt, output=output)
        output.append(token.token_id)
    assert num_changed, "the bad words never mattered"


def test_stop_tokens_are_suppressed_before_min_tokens(engine: PlainEngine) -> None:
    sampling = SamplingParams(max_tokens=6, temperature=0.0, logit_bias=((5, 90.0),), min_tokens=3)
    slot = engine.start("a", sampling, [1, 2], suppressed=(5,))
    tokens, pages = [1, 2], engine.pages(10)
    for start in range(6):
        known = tokens[start : start + 1] if start else tokens
        item = BatchItem(slot=slot, token_ids=known, start=start and start + 1, page_ids=pages, samples=True)
        (token,) = engine.step(item).values()
        tokens.append(token.token_id)
    assert [token == 5 for token in tokens[2:]] == [False] * 3 + [True] * 3


@BOTH
@pytest.mark.parametrize("length", LENGTHS)
def test_a_cached_prefix_gives_the_tokens_of_a_cold_start(
    engine: PlainEngine, length: int, sampling: SamplingParams
) -> None:
    prompt = prompt_of(length)
    first_pages = engine.pages(length + 10)
    cold = engine.generate(prompt, sampling, pages=first_pages)
    num_shared = (length - 1) // PAGE
    pages = first_pages[:num_shared] + engine.pages(length + 10 - num_shared * PAGE)
    assert_same(engine.generate(prompt, sampling, pages=pages, cached=num_shared * PAGE), cold)


@BOTH
@pytest.mark.parametrize("produced", [1, 4, 9])
def test_a_stream_resumes_from_its_tokens_in_a_new_engine(
    engine: PlainEngine, fresh_engine: PlainEngine, produced: int, sampling: SamplingParams
) -> None:
    prompt = prompt_of(9)
    whole = engine.generate(prompt, sampling)
    so_far = prompt + [token.token_id for token in whole[:produced]]
    rest = SamplingParams(
        max_tokens=10 - produced,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        num_logprobs=2,
    )
    assert_same(fresh_engine.generate(so_far, rest), whole[produced:])


@BOTH
def test_pages_written_by_another_engine_give_the_same_tokens(
    engine: PlainEngine, fresh_engine: PlainEngine, sampling: SamplingParams
) -> None:
    """A handoff without its protocol: pages are copied byte by byte into another engine's pool."""
    prompt = prompt_of(14)
    pages = engine.pages(24)
    whole = engine.generate(prompt, sampling, pages=pages)
    theirs = fresh_engine.pages(24)
    fresh_engine.runner.pool.bytes[theirs[:4]] = engine.runner.pool.bytes[pages[:4]]
    token = whole[0].token_id
    rest = []
    slot = fresh_engine.start("r", sampling)
    for position in range(14, 23):
        item = BatchItem(slot=slot, token_ids=[token], start=position, page_ids=theirs, samples=True)
        (chosen,) = fresh_engine.step(item).values()
        rest.append(chosen)
        token = chosen.token_id
    assert_same(rest, whole[1:])


@BOTH
def test_other_requests_in_the_batch_change_no_token(engine: PlainEngine, sampling: SamplingParams) -> None:
    """Requests start at different steps, in chunks, together with the decodes of earlier requests."""
    prompts = {RequestId(f"r{length}"): prompt_of(length) for length in (1, 4, 17, 5, 40, 9)}
    alone = {name: engine.generate(prompt, sampling) for name, prompt in prompts.items()}
    tokens = {name: list(prompt) for name, prompt in prompts.items()}
    pages = {name: engine.pages(len(prompt) + 10) for name, prompt in prompts.items()}
    computed = dict.fromkeys(prompts, 0)
    together: dict[RequestId, list[SampledToken]] = {name: [] for name in prompts}
    slots: dict[RequestId, SlotId] = {}
    step = 0
    while any(len(got) < 10 for got in together.values()):
        step += 1
        active = [name for name in list(prompts)[:step] if len(together[name]) < 10]
        items = []
        for name in sorted(active, key=lambda name: not together[name]):  # decodes first
            if name not in slots:
                slots[name] = engine.start(name, sampling, prompts[name])
            end = min(len(tokens[name]), computed[name] + 7)
            items.append(
                BatchItem(
                    slot=slots[name],
                    token_ids=tokens[name][computed[name] : end],
                    start=computed[name],
                    page_ids=pages[name],
                    samples=end == len(tokens[name]),
                )
            )
            computed[name] = end
        for name, token in engine.step(*items).items():
            together[name].append(token)
            tokens[name].append(token.token_id)
    for name in prompts:
        assert_same(together[name], alone[name])


def test_a_chunk_that_is_not_the_last_samples_no_token(engine: PlainEngine) -> None:
    slot = engine.start("r", GREEDY)
    item = BatchItem(slot=slot, token_ids=[1, 2, 3], start=0, page_ids=engine.pages(8), samples=False)
    assert engine.step(item) == {}


def test_repeating_a_step_gives_the_same_token(engine: PlainEngine) -> None:
    slot = engine.start("r", SEEDED)
    item = BatchItem(slot=slot, token_ids=[1, 2, 3], start=0, page_ids=engine.pages(8), samples=True)
    assert engine.step(item) == engine.step(item)


def test_greedy_tokens_depend_on_the_prompt(engine: PlainEngine) -> None:
    """Guards the other tests: a model that always samples the same token would pass them."""
    answers = {tuple(token.token_id for token in engine.generate(prompt_of(9, seed), GREEDY)) for seed in range(5)}
    assert len(answers) == 5


def test_a_step_aborted_between_layers_leaves_the_runner_usable(engine: PlainEngine) -> None:
    prompt = prompt_of(9)
    expected = engine.generate(prompt, GREEDY)
    num_breaks = 0

    def stop_before_the_second_layer() -> None:
        nonlocal num_breaks
        num_breaks += 1
        if num_breaks == 2:
            raise TimeoutError("the request has ended")

    engine.runner.between_layers = stop_before_the_second_layer
    with pytest.raises(TimeoutError, match="the request has ended"):
        engine.generate(prompt, GREEDY)
    engine.end(SlotId(0))
    engine.runner.between_layers = None
    assert_same(engine.generate(prompt, GREEDY), expected)
